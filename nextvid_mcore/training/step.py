"""One training step: reference pass, forward and backward, one clipped update, EMA (Sections 3.1-3.4).

Everything round it (data, checkpoints, logs) is the loop's; benchmarks and parity tests call this alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nextvid_mcore.config import RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch, NextVid
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.parallel.split import make_split
from nextvid_mcore.schedule import StagePoint
from nextvid_mcore.targets import build_target, target_channels
from nextvid_mcore.training.engine import Engine
from nextvid_mcore.training.monitors import Collapse
from nextvid_mcore.training.optimizer import RoleOptimizers, finalize_grads, wrap_roles


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    loss_flow, loss_align: None where that loss is switched off.
    applied: False when the loss or a gradient was not finite anywhere: then no weight moved.
    grad_norm: over all roles, before clipping. monitors: see training/monitors.py.
    """

    loss: float
    loss_flow: float | None
    loss_align: float | None
    grad_norm: float
    applied: bool
    monitors: dict[str, float]


class TrainStep:
    """This rank's networks, optimizers and engine."""

    def __init__(self, config: RunConfig, groups: RoleGroups) -> None:
        """Build and fill the networks; every rank of the run must call it.

        Raises:
            ConfigError: the target's files or the backend are missing.
        """
        self.config, self.groups = config, groups
        cuda = torch.cuda.is_available()
        self.device = device = (
            torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        )
        split = make_split(config, groups.layout)
        generate = config.model.generate
        self.target = build_target(config, device, split.dtype) if groups.last_stage and generate else None
        channels = target_channels(config) if generate else 0
        self.model = NextVid(config, split, groups.collection, channels).to(device)
        self.model.reset_parameters()
        self.model.train()
        self.roles = wrap_roles(self.model, groups)
        self.optimizers = RoleOptimizers(self.roles, config.optim, groups, self.model.reference)
        self.engine = Engine(self.model, groups, self.target)
        self.losses = [name for name, on in (("flow", generate), ("align", config.model.align)) if on]

    def run(self, point: StagePoint, clips: Sequence[ClipBatch]) -> StepResult:
        """Take the step at `point` on this replica's micro-batches."""
        self.optimizers.set_lr(point)
        sums, monitors = self.gradients(point, clips)
        loss, flow, align = self._mean_losses(sums)
        outcome = self.optimizers.step(torch.tensor(loss, device=self.device))
        return StepResult(loss, flow, align, outcome.grad_norm, outcome.applied, monitors)

    def gradients(
        self, point: StagePoint, clips: Sequence[ClipBatch]
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        """Leave the step's mean gradient in the roles' buffers.

        Returns:
            The losses that there are, in the order of `self.losses`, the mean over this replica's
            micro-batches (last pipeline stage, else None), and the monitors.
        """
        collapse = Collapse(self.config.model.align)
        losses: list[torch.Tensor] = []

        def watch(terms: LossTerms, batch: MicroBatch) -> None:
            losses.append(torch.stack([getattr(terms, x).mean() for x in self.losses]).detach().double())
            collapse.add(terms.z, terms.target, terms.aligned)

        self.optimizers.zero_grad()
        self.engine.gradients(point, clips, watch)
        finalize_grads(self.roles.values(), self.groups)
        if not losses:
            return None, self._from_last_stage(None, collapse.names)
        groups = [self.groups.collection.dp]
        if self.groups.layout.sequence:
            groups.insert(0, self.groups.collection.tp)
        found = collapse.result(groups)
        return torch.stack(losses).mean(0), self._from_last_stage(found, collapse.names)

    def _mean_losses(self, mine: torch.Tensor | None) -> tuple[float, float | None, float | None]:
        """Loss, flow and align over all data ranks, on every rank; None for what is switched off."""
        found = None
        if mine is not None:
            mine = mine.clone()
            dist.all_reduce(mine, group=self.groups.collection.dp)
            found = dict(zip(self.losses, (mine / self.groups.layout.data).tolist(), strict=True))
        shared = self._from_last_stage(found, self.losses)
        flow, align = shared.get("flow"), shared.get("align")
        return self.config.loss.total(flow, align), flow, align

    def _from_last_stage(self, values: dict[str, float] | None, names: Sequence[str]) -> dict[str, float]:
        """The last pipeline stage's numbers on every stage."""
        pipeline = self.groups.collection.pp
        if pipeline.size() == 1:
            return values
        packed = torch.tensor([values[name] if values else 0.0 for name in names], dtype=torch.float64)
        packed = packed.to(self.device)
        dist.broadcast(packed, dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
        return dict(zip(names, packed.tolist(), strict=True))
