"""VA-VAE's encoder in bf16, eager and fused, against fp32; and beside the step against in line.

Tolerance: a bf16 encoder of random weights is off by a few per cent of the latents' spread, whatever rounds
first. Fused it may not be worse than eager by more than half.
"""

from __future__ import annotations

import dataclasses

import parity
import pytest
import torch
from launch import run

from nextvid_mcore import recipes
from nextvid_mcore.config import ModelConfig, TransformerShape
from nextvid_mcore.targets.autoencoder import AutoencoderKL
from nextvid_mcore.targets.va_vae import VaVae


def test_the_fused_encoder_equals_the_eager_one() -> None:
    shape = TransformerShape(width=24, depth=1, heads=2, mlp=48)
    model = ModelConfig(encoder=shape, image_size=128, patch_size=16, tubelet_size=2)
    torch.manual_seed(0)
    weights = AutoencoderKL().state_dict()
    video = torch.rand(3, 3, 8, 128, 128, device="cuda") * 2 - 1
    video[1] = video[1, :, :1]
    static = torch.tensor([False, True, False])

    def latents(dtype: torch.dtype, fused: bool) -> torch.Tensor:
        autoencoder = AutoencoderKL()
        autoencoder.load_state_dict(weights)
        target = VaVae(
            model,
            autoencoder.to("cuda", dtype),
            torch.zeros(32),
            torch.ones(32),
            chunk=8,
            fused=fused,
        )
        return target.latents(video, static, first=1)

    exact = latents(torch.float32, False)
    eager, fused = (latents(torch.bfloat16, each) for each in (False, True))
    errors = [float((x - exact).square().mean().sqrt() / exact.std()) for x in (eager, fused)]
    assert exact.shape == (3, 3, 64, 64) and 0 < errors[0] < 0.05
    assert errors[1] < 1.5 * errors[0], errors
    for _ in range(3):  # programs that wait for each other's sums always find all of them
        assert torch.equal(latents(torch.bfloat16, True), fused)


def losses(beside: bool) -> list[float]:
    config = recipes.get("tiny")
    config = config.altered(
        stages=(dataclasses.replace(config.stages[0], batch=4),),
        train={"micro_batch": 2, "init_noise": 0.02},
    )
    step = parity.built(config)
    assert step.engine.ahead.stream is not None
    if not beside:
        step.engine.ahead.stream = None
    point = parity.schedule(config).at(0)
    found = []
    for i in range(3):
        generator = torch.Generator("cuda").manual_seed(i)
        found.append(step.run(point, _clips(config, i, generator)).loss)
    return found


def _clips(config, step, generator):
    from nextvid_mcore.data import ClipBatch

    shape = (2, 3, config.stages[0].frames, config.model.image_size, config.model.image_size)
    return [
        ClipBatch(
            video=torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator),
            index=torch.arange(2) + 4 * step + 2 * i,
            label=torch.full((2,), -1),
            static=torch.zeros(2, dtype=torch.bool),
            items=[""] * 2,
        )
        for i in range(2)
    ]


def test_latents_made_beside_the_step_are_those_made_in_line() -> None:
    beside, in_line = (run(losses, 1, each)[0] for each in (True, False))
    assert beside == pytest.approx(in_line, rel=1e-5)
