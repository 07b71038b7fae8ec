"""A run for a laptop's CPU: every part of the real one, seconds a step."""

from __future__ import annotations

from nextvid_mcore.config import (
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

SHORT = {"frames": 8, "batch": 8, "max_micro_batch": 4}
LONG = {"frames": 16, "batch": 4, "max_micro_batch": 4}


def tiny() -> RunConfig:
    """64-pixel clips, pixel targets, the four stages of Table 8 in 120 steps."""
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            encoder=TransformerShape(width=96, depth=4, heads=4, mlp=384),
            predictor=TransformerShape(width=48, depth=2, heads=4, mlp=192),
            decoder=TransformerShape(width=48, depth=2, heads=4, mlp=192),
            image_size=64,
            patch_size=8,
        ),
        stages=(
            StageConfig("warmup", 20, lr_start=1e-4, lr_end=1e-3, tau_samples=4, **SHORT),
            StageConfig("stable1", 40, lr_start=1e-3, lr_end=9e-4, tau_samples=4, **SHORT),
            StageConfig("stable2", 40, lr_start=9e-4, lr_end=2e-4, flow_lr=1.6e-3, **SHORT),
            StageConfig("cooldown", 20, lr_start=2e-4, lr_end=2e-6, flow_lr=6e-4, **LONG),
        ),
        target=TargetConfig(kind="pixels"),
        data=DataConfig(fps=4.0, workers=1),
        optim=OptimConfig(ema=0.99),
        train=TrainConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=40),
        eval=EvalConfig(every=40, samples=16),
    )
