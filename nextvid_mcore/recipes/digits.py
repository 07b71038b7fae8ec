"""Runs on moving digits: encoders of 1 to 5 million parameters, minutes on a GPU, a laptop if need be.

Made for the evidence in docs/results.md, so small and short where the paper is large and long: a horizon
of the EMA that fits a thousand steps, one tau a sample, and no stage of longer clips.
"""

from __future__ import annotations

import dataclasses

from nextvid_mcore.config import (
    MOVING_DIGITS,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TargetConfig,
    TrainConfig,
    TransformerShape,
)

FRAMES, BATCH, STEPS = 16, 64, 1000
IMAGE, PATCH = 64, 8
PEAK = 7e-4  # learning rate: at 2e-3, or without a warm-up, all features become one constant first
EMA = 0.98  # faster than the paper's, as a run is a hundredth as long; see docs/results.md
PEAK_FLOW = 2e-3  # of the decoder, which must first learn to denoise
PIXEL_SCALE = 8.0  # the clips' deviation is 0.12
SIZES = {  # encoder; predictor and decoder. Wide and shallow: a step this small waits for its launches
    "s": (TransformerShape(128, 4, 4, 512), TransformerShape(192, 3, 6, 768)),  # 0.8M
    "m": (TransformerShape(256, 4, 8, 1024), TransformerShape(192, 3, 6, 768)),  # 3.3M
    "l": (TransformerShape(320, 4, 10, 1280), TransformerShape(192, 3, 6, 768)),  # 5.1M
}


def stages(
    steps: int,
    batch: int = BATCH,
    peak: float = PEAK,
    frames: int = FRAMES,
    peak_flow: float = PEAK_FLOW,
) -> tuple[StageConfig, ...]:
    """Warm-up, stable and cool-down over `steps` (10 or more): Table 8's shape, a fifth of it up."""
    up, down = max(1, steps // 5), max(1, 3 * steps // 10)
    common = {"frames": frames, "batch": batch, "max_micro_batch": batch, "flow_lr": peak_flow}
    return (
        StageConfig("warmup", up, lr_start=peak / 100, lr_end=peak, **common),
        StageConfig("stable", max(1, steps - up - down), lr_start=peak, lr_end=peak, **common),
        StageConfig(
            "cooldown", down, lr_start=peak, lr_end=peak / 1000, **common | {"flow_lr": peak_flow / 4}
        ),
    )


def make(
    size: str,
    steps: int = STEPS,
    batch: int = BATCH,
    peak: float = PEAK,
    image: int = IMAGE,
    patch: int = PATCH,
    frames: int = FRAMES,
    peak_flow: float = PEAK_FLOW,
) -> RunConfig:
    """The run of one of `SIZES`, `steps` long, on `frames` frames of `image` pixels."""
    encoder, other = SIZES[size]
    return RunConfig(
        recipe=f"digits_{size}",
        model=ModelConfig(
            encoder=encoder,
            predictor=other,
            decoder=other,
            image_size=image,
            patch_size=patch,
        ),
        stages=stages(steps, batch, peak, frames, peak_flow),
        target=TargetConfig(kind="pixels", pixel_scale=PIXEL_SCALE),
        data=DataConfig(manifest=MOVING_DIGITS, eval_manifest=MOVING_DIGITS, workers=1),
        optim=OptimConfig(ema=EMA),
        train=TrainConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=250),
        eval=EvalConfig(every=250, samples=128, batch=32),
    )


def digits_s() -> RunConfig:
    """0.8M encoder on moving digits."""
    return make("s")


def digits_m() -> RunConfig:
    """3.3M encoder on moving digits, 64 pixels, pixel targets, 1000 steps of 64 clips."""
    return make("m")


def digits_l() -> RunConfig:
    """5.1M encoder on moving digits."""
    return make("l")


def digits_32() -> RunConfig:
    """The full model of docs/results.md: 32 pixels, digits of 22, 1200 steps; minutes on a GPU."""
    config, narrow = make("m", 1200, image=32), TransformerShape(192, 2, 6, 768)
    return dataclasses.replace(
        config,
        recipe="digits_32",
        model=dataclasses.replace(
            config.model, predictor=narrow, decoder=narrow, init_std=0.02, compile=False
        ),
        target=dataclasses.replace(config.target, compile=False),  # not worth a minute here
        data=dataclasses.replace(config.data, manifest=f"{MOVING_DIGITS}:32:22"),
        train=dataclasses.replace(config.train, precision="bf16"),
        eval=dataclasses.replace(config.eval, every=150, knn_every=300),
        checkpoint=CheckpointConfig(every=600, keep=1),
    )


def digits_film() -> RunConfig:
    """digits_32 for pictures: three times the steps, and a decoder wide enough to take all of the noise away.

    A decoder narrower than the target (384 channels) leaves the noise of the other channels where it is.
    """
    config, wide = digits_32(), TransformerShape(512, 2, 8, 2048)
    return dataclasses.replace(
        config,
        recipe="digits_film",
        model=dataclasses.replace(config.model, predictor=wide, decoder=wide),
        stages=stages(3600, peak_flow=1e-3),
        eval=dataclasses.replace(config.eval, every=300, knn_every=300),
        checkpoint=CheckpointConfig(every=1200, keep=1),
    )


def digits() -> RunConfig:
    """The same as digits_m."""
    return dataclasses.replace(digits_m(), recipe="digits")


RECIPES = {
    "digits": digits,
    "digits_s": digits_s,
    "digits_m": digits_m,
    "digits_l": digits_l,
    "digits_32": digits_32,
    "digits_film": digits_film,
}
