"""A training step that keeps every network's gradient norm, and makes a pass that stands out once more.

A loss or a gradient far from those of the steps before is either what training does or a faulty pass. So the
pass is made again, from the same weights and samples, before the update: a sound one gives the same numbers
(FP8 with delayed scales nearly: the first pass has moved them). The update takes the first pass's gradient.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nextvid_mcore.data import ClipBatch
from nextvid_mcore.schedule import StagePoint
from nextvid_mcore.training.monitors import Collapse
from nextvid_mcore.training.step import TrainStep

BEFORE = 11  # steps whose medians are what is usual
EARLY = 30  # steps in which everything moves
LOSS, NORM = 1.15, 4.0  # times the usual: stands out


class WatchedStep(TrainStep):
    """norms: of each network by step, before clipping; again: the passes that stood out, and their second."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norms: dict[str, list[float]] = {role: [] for role in self.roles}
        self.again: list[dict[str, Any]] = []
        self._seen: list[tuple[float, float]] = []  # loss and norm over all networks

    def accumulate(self, point: StagePoint, clips: Sequence[ClipBatch]) -> tuple[torch.Tensor, Collapse]:
        """One more wait for the device than a user's step has."""
        means, collapse = super().accumulate(point, clips)
        first = self._numbers(means)
        seen = self._total(first)
        if stands_out(seen, self._seen):
            buffers = [buffer.grad_data for role in self.roles.values() for buffer in role.buffers]
            kept = [x.clone() for x in buffers]
            second = self._numbers(super().accumulate(point, clips)[0])
            torch._foreach_copy_(buffers, kept)
            self.again.append({"step": point.step, "first": first, "second": second})
        self._seen.append(seen)
        for role, norms in self.norms.items():
            norms.append(first[role])
        return means, collapse

    def _numbers(self, means: torch.Tensor) -> dict[str, float]:
        """Loss terms, and gradient norms by network."""
        norms = [
            torch.stack([torch.linalg.vector_norm(x.grad_data, dtype=torch.float64) for x in role.buffers])
            for role in self.roles.values()
        ]
        found = torch.cat([means, torch.stack([x.norm() for x in norms])]).tolist()
        return {name: float(f"{x:.6g}") for name, x in zip((*self.losses, *self.roles), found, strict=True)}

    def _total(self, numbers: Mapping[str, float]) -> tuple[float, float]:
        loss = self.config.loss.total(numbers.get("flow"), numbers.get("align"))
        return loss, math.hypot(*(numbers[role] for role in self.roles))


def stands_out(seen: tuple[float, float], before: Sequence[tuple[float, float]]) -> bool:
    """Whether a step's loss or norm is not finite, or far above the steps before."""
    if not all(map(math.isfinite, seen)):
        return True
    near = [x for x in before[-BEFORE:] if all(map(math.isfinite, x))]
    if len(before) < EARLY or not near:
        return False
    usual = [statistics.median(column) for column in zip(*near, strict=True)]
    return any(x > times * y for x, times, y in zip(seen, (LOSS, NORM), usual, strict=True))
