"""The training step with its target's network online: what it asks of it, and what it makes of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from launch import run

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


def online() -> dict:
    sys.path.insert(0, BENCHMARKS)
    from common import Bench, online_vae_target, quick_start

    from nextvid_mcore import recipes
    from nextvid_mcore.config import TargetConfig
    from nextvid_mcore.data import normalize
    from nextvid_mcore.parallel.groups import init_distributed

    init_distributed()
    config = recipes.get("tiny")
    stage = dataclasses.replace(config.stages[0], frames=8, batch=4)
    config = dataclasses.replace(
        config,
        stages=(stage,),
        model=dataclasses.replace(config.model, patch_size=16),
        mask=dataclasses.replace(config.mask, keep=(0.5, 0.25)),
        target=TargetConfig("va_vae"),
        train=dataclasses.replace(config.train, micro_batch=2),
    )
    with quick_start(online_vae_target):
        bench = Bench(config)
    target, asked = bench.step.target, []
    latents = target.latents

    def watch(video, static, indices, first):
        asked.append((tuple(video.shape), list(indices), first))
        return latents(video, static, indices, first)

    target.latents = watch
    losses = [bench.step.gradients(bench.point, bench.clips)[0]["flow"]]
    whole = latents(normalize(bench.clips[0].video))  # every micro-batch has the same video
    target.latents = lambda video, static, indices, first: whole[:, first:]
    losses.append(bench.step.gradients(bench.point, bench.clips)[0]["flow"])
    frozen = not any(p.requires_grad for p in target.autoencoder.parameters())
    return {"asked": asked, "losses": losses, "frozen": frozen, "whole": tuple(whole.shape)}


def test_predicted_frames_alone_are_encoded_once_and_the_loss_is_of_them():
    found = run(online, 1)[0]
    assert found["asked"] == [((2, 3, 8, 64, 64), pair, 1) for pair in ([0, 1], [2, 3])]
    assert found["whole"] == (2, 4, 16, 64) and found["frozen"]
    online_loss, resident_loss = found["losses"]
    assert online_loss > 0 and abs(online_loss - resident_loss) < 1e-6 * online_loss
