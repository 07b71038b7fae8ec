"""What tests of the probe share: an encoder that is known to hold both labels of moving digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextvid_mcore.evaluation.datasets import build_data
from nextvid_mcore.evaluation.encoders import Wrapped
from nextvid_mcore.evaluation.presets import ProbeConfig, preset
from nextvid_mcore.evaluation.ranks import Ranks
from nextvid_mcore.evaluation.run import Job

ALONE = Ranks(0, 1, torch.device("cpu"))


class Spectrum(Wrapped):
    """A digit that drifts on a torus keeps its spectrum's magnitude, and its phase turns with its motion."""

    def __init__(self) -> None:
        super().__init__("spectrum", nn.Identity(), None, 1)

    def __call__(self, video: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        waves = torch.fft.rfft2(video[:, 0].double())  # [B, T, H, W / 2 + 1]
        first = waves[:, 0]
        around = torch.cat([first[:, -8:, :8], first[:, :8, :8]], dim=1).abs().log1p().flatten(1)  # [B, 128]
        turn = (waves[:, :-1].conj() * waves[:, 1:]).sum(1)
        turn = torch.cat([turn[:, -4:, 1:5], turn[:, :4, 1:5]], dim=1)
        turn = torch.view_as_real(turn / turn.abs().clamp_min(1e-9)).flatten(1)  # [B, 64]
        around = around - around.mean(1, keepdim=True)
        around = around / around.norm(dim=1, keepdim=True)
        both = torch.cat([around, turn / turn.norm(dim=1, keepdim=True)], dim=1).float()  # [B, 192]
        token = torch.stack([both, both.roll(1, 0) * 0, both], dim=1)  # one of three tokens says nothing
        return [token for _ in layers]


def digits(**changes: Any) -> ProbeConfig:
    """A moving-digits probe of seconds."""
    small = {"train_items": 1200, "val_items": 300, "size": 32, "frames": 4, "batch": 48, "epochs": 4}
    small |= {"lrs": (3e-3, 1e-3), "weight_decays": (0.01,), "holdout": 0.1}
    return dataclasses.replace(preset("moving_digits"), **(small | changes))


def data(config: ProbeConfig):  # noqa: ANN201
    return build_data(config, None, None, "cpu")


def job(out: Path, **changes: Any) -> Job:
    return Job(**({"out": out, "workers": 0, "chunk": 20, "progress": False} | changes))
