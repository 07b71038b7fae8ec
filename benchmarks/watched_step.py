"""A training step that keeps every network's gradient norm, and makes a pass that stands out once more.

A loss or a gradient far from those of the steps before is either what training does or a faulty pass. So the
pass is made again, from the same weights and samples, before the update: a sound one gives the same numbers
(FP8 with delayed scales nearly: the first pass has moved them). Where the loss stands out, so are passes with
weights of before the last update, of all networks and of one at a time: what gives the usual loss says whose
update made the jump. The step's own update takes the first pass's gradient.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
        self._before: dict[str, list[torch.Tensor]] = {}  # master weights before the last update

    def accumulate(self, point: StagePoint, clips: Sequence[ClipBatch]) -> tuple[torch.Tensor, Collapse]:
        """One more wait for the device than a user's step has."""
        means, collapse = super().accumulate(point, clips)
        first = self._numbers(means)
        seen = self._total(first)
        loss, norm = stands_out(seen, self._seen)
        if loss or norm:
            buffers = [buffer.grad_data for role in self.roles.values() for buffer in role.buffers]
            kept = [x.clone() for x in buffers]
            told = {
                "step": point.step,
                "first": first,
                "second": self._numbers(super().accumulate(point, clips)[0]),
            }
            if loss and self._before:
                told |= self._look_back(
                    lambda: self._numbers(super(WatchedStep, self).accumulate(point, clips)[0])
                )
            torch._foreach_copy_(buffers, kept)
            self.again.append(told)
        self._before = {
            role: [x.clone() for x in optimizer._masters]
            for role, optimizer in self.optimizers.optimizers.items()
        }
        self._seen.append(seen)
        for role, norms in self.norms.items():
            norms.append(first[role])
        return means, collapse

    @torch.no_grad()
    def _look_back(self, make: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """What the jump came from.

        largest: parameters with the largest gradients; astray: weights that aren't their masters rounded;
        moved: largest and whole change of the masters in the last update; earlier: a pass with the weights of
        before it, of one network and of all.
        """
        optimizers = self.optimizers.optimizers
        grads = [
            (float(param.main_grad.norm()), f"{role}.{name}")
            for role, wrapped in self.roles.items()
            for name, param in wrapped.module.named_parameters()
        ]
        told = {"largest": sorted(grads, reverse=True)[:5], "astray": {}, "moved": {}, "earlier": {}}
        now = {role: [x.clone() for x in optimizer.weights] for role, optimizer in optimizers.items()}
        for role, optimizer in optimizers.items():
            pairs = zip(optimizer.weights, optimizer._masters, strict=True)
            told["astray"][role] = sum(int((x != master.to(x.dtype)).sum()) for x, master in pairs)
            moved = torch._foreach_sub(optimizer._masters, self._before[role])
            norms = torch.stack(torch._foreach_norm(moved)).norm()
            told["moved"][role] = [max(float(x.abs().max()) for x in moved), float(norms)]
        for roles in (*((role,) for role in optimizers), tuple(optimizers)):
            for role in roles:
                torch._foreach_copy_(optimizers[role].weights, self._before[role])
            with torch.enable_grad():
                told["earlier"][" and ".join(roles)] = make()
            for role in roles:
                torch._foreach_copy_(optimizers[role].weights, now[role])
        return told

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


def stands_out(seen: tuple[float, float], before: Sequence[tuple[float, float]]) -> tuple[bool, bool]:
    """Whether a step's loss and its norm are not finite, or far above those of the steps before."""
    if not all(map(math.isfinite, seen)):
        return not math.isfinite(seen[0]), True
    near = [x for x in before[-BEFORE:] if all(map(math.isfinite, x))]
    if len(before) < EARLY or not near:
        return False, False
    loss, norm = (statistics.median(column) for column in zip(*near, strict=True))
    return seen[0] > LOSS * loss, seen[1] > NORM * norm
