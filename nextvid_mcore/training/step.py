"""One training step: reference pass, forward and backward, one clipped update, EMA (Sections 3.1-3.4).

Everything round it (data, checkpoints, logs) is the loop's; benchmarks and parity tests call this alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nextvid_mcore.config import RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models import fp8, fp8_check, fp8_mlp, fused
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch, NextVid
from nextvid_mcore.parallel import communicators, watchdog
from nextvid_mcore.parallel.reference_edge import ReferenceEdge
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.parallel.split import make_places
from nextvid_mcore.parallel.stages import stage_layers
from nextvid_mcore.schedule import StagePoint
from nextvid_mcore.targets import build_target, target_channels
from nextvid_mcore.training import graphs
from nextvid_mcore.training.ahead import Report
from nextvid_mcore.training.engine import Engine
from nextvid_mcore.training.microbatch import Outline
from nextvid_mcore.training.monitors import Collapse
from nextvid_mcore.training.optimizer import RoleOptimizers, finalize_grads, wrap_roles
from nextvid_mcore.training.separate import SeparateEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    loss_flow, loss_align: None where that loss is switched off.
    applied: False when the loss or a gradient was not finite anywhere: then no weight moved.
    grad_norm: over all roles, before clipping. monitors: see training/monitors.py.
    crossed: between seats over all edges, `edge_bytes_per_clip` by direction, and `reference_bytes` of the
        weights with which this step's features were made. Empty where all roles sit together.
    """

    loss: float
    loss_flow: float | None
    loss_align: float | None
    grad_norm: float
    applied: bool
    monitors: dict[str, float]
    crossed: dict[str, Any]


class TrainStep:
    """This rank's networks, optimizers and engine."""

    def __init__(self, config: RunConfig, seats: Seats) -> None:
        """Build and fill the networks; every rank of the run must call it.

        Raises:
            ConfigError: the target's files or the backend are missing.
        """
        self.config, self.seats = config, seats
        cuda = torch.cuda.is_available()
        self.device = device = (
            torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        )
        fused.use(config.model.compile)
        fp8_mlp.use(config.model.compile and config.fp8.fused)
        recorded = graphs.wanted(config, seats.placement)
        if recorded:
            graphs.own_stream()
        communicators.connect(seats, device)
        places = make_places(config, seats)
        generate = config.model.generate
        decodes = "decoder" in places and generate
        dtype = next(iter(places.values())).split.dtype
        self.target = build_target(config, device, dtype) if decodes else None
        channels = target_channels(config) if generate else 0
        self.model = NextVid(config, places, channels).to(device)
        if cuda:
            fp8_check.check(config, {n: each.config for n, each in self.model.named_children()}, device)
        self.model.reset_parameters()
        self.model.train()
        groups = {role: seats.of(role) for role in self.model.roles()}
        self.roles = wrap_roles(self.model, groups)
        self.reference_edge = self._reference_edge()
        self.optimizers = RoleOptimizers(
            self.roles,
            config.optim,
            groups,
            self.model.reference if "student" in self.model.holds else None,
            self.reference_edge,
        )
        engine = SeparateEngine if seats.placement.separate else Engine
        self.engine = engine(self.model, seats, self.target)
        self.engine.graphs = graphs.Graphs(self.engine) if recorded else None
        self.losses = [name for name, on in (("flow", generate), ("align", config.model.align)) if on]
        self.rehearsals = fp8.rehearsals(config.fp8)
        self._forgotten = False  # the last step's gradients are, for the next one

    def _reference_edge(self) -> ReferenceEdge | None:
        """Brings the reference to the generator's ranks, where it is run there."""
        placement = self.seats.placement
        if not self.config.model.align or "student" in placement.seat_of("reference").roles:
            return None
        encoder = self.model.reference if "reference" in self.model.holds else None
        return ReferenceEdge(
            self.seats, encoder, stage_layers(self.config, placement.encoder.layout.pipeline)
        )

    def close(self) -> None:
        """Before process groups end: NCCL waits for recorded passes that hold its communicators."""
        if self.engine.graphs is not None:
            self.engine.graphs.clear()

    def parts(self) -> dict[str, torch.nn.Module]:
        """This rank's networks by name, the frozen ones too."""
        parts = dict(self.model.named_children())
        if isinstance(self.target, torch.nn.Module):
            parts["target"] = self.target
        return parts

    def run(self, point: StagePoint, clips: Sequence[ClipBatch], coming: Outline | None = None) -> StepResult:
        """Take the step at `point` on the micro-batches of this rank's first seat.

        coming: the next step's first micro-batch, for which this step draws. Without it that step does, with
        the same result, while the device waits.
        """
        self.optimizers.set_lr(point)
        self.engine.traffic.reset()
        means, collapse = self.accumulate(point, clips)
        named = dict(zip(self.losses, means, strict=True))
        report = Report(torch.cat([means, self._monitors(collapse)]))
        watchdog.enter("optimizer step")
        loss = self.config.loss.total(named.get("flow"), named.get("align"))
        outcome = self.optimizers.step(loss, lambda: self._prepare(coming))
        losses, monitors = self._named(report.read(), collapse)
        crossed = self._crossed(point.batch) if self.seats.placement.separate else {}
        flow, align = losses.get("flow"), losses.get("align")
        loss = self.config.loss.total(flow, align)
        return StepResult(loss, flow, align, outcome.grad_norm, outcome.applied, monitors, crossed)

    def _prepare(self, coming: Outline | None) -> None:
        """The next step's beginning, before the host waits for this one."""
        self.optimizers.zero_grad()
        self._forgotten = True
        if coming is not None:
            self.engine.draw_ahead(coming)

    def gradients(
        self, point: StagePoint, clips: Sequence[ClipBatch]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Leave the step's mean gradient in the roles' buffers.

        Returns:
            The losses that there are (flow, align), means over the step, and the monitors; on every rank.
        """
        means, collapse = self.accumulate(point, clips)
        return self._named(torch.cat([means, self._monitors(collapse)]).tolist(), collapse)

    def accumulate(self, point: StagePoint, clips: Sequence[ClipBatch]) -> tuple[torch.Tensor, Collapse]:
        """The mean gradient in the roles' buffers, the mean losses on the device; waits for nothing."""
        while self.rehearsals:  # a process's first step: passes whose gradients are dropped
            self.rehearsals -= 1
            self._pass(point, clips)
        return self._pass(point, clips)

    def _pass(self, point: StagePoint, clips: Sequence[ClipBatch]) -> tuple[torch.Tensor, Collapse]:
        try:
            return self._forward_backward(point, clips)
        except graphs.NotRecorded as failure:
            log.warning(
                "rank %d: a micro-batch could not be recorded as a CUDA graph (%s); this run goes on without "
                "graphs, and slower. --train.cuda-graphs off spares the attempt",
                dist.get_rank(),
                failure,
            )
        self.engine.graphs.give_up()
        self.engine.graphs = None
        return self._forward_backward(point, clips)  # from zeroed gradients, with the same draws

    def _forward_backward(
        self, point: StagePoint, clips: Sequence[ClipBatch]
    ) -> tuple[torch.Tensor, Collapse]:
        collapse = Collapse(self.config.model.align)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.losses}

        def watch(terms: LossTerms, batch: MicroBatch) -> None:
            for name in self.losses:
                if getattr(terms, name) is not None:
                    found[name].append(getattr(terms, name).detach().double().mean())
            if terms.moments:
                collapse.take(terms.moments)
            elif terms.z is not None:
                collapse.add(terms.z, terms.target, terms.aligned)

        if not self._forgotten:
            self.optimizers.zero_grad()
        self._forgotten = False
        self.engine.gradients(point, clips, watch)
        watchdog.enter("gradient reduction")
        finalize_grads(self.roles, {role: self.seats.of(role) for role in self.roles})
        return self._mean_losses(found), collapse

    def _named(self, values: list[float], collapse: Collapse) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and monitors by name, which stand one after the other in `values`."""
        losses, monitors = values[: len(self.losses)], values[len(self.losses) :]
        return (
            dict(zip(self.losses, losses, strict=True)),
            dict(zip(collapse.names, monitors, strict=True)),
        )

    def _mean_losses(self, found: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """Means over all replicas of the seat that has a loss, in the order of `losses`, on every rank."""
        mine = torch.zeros(len(self.losses), dtype=torch.float64, device=self.device)
        for i, name in enumerate(self.losses):
            groups = self.seats.of("decoder" if name == "flow" else "predictor")
            if found[name] and groups.tensor_rank == 0:
                mine[i] = torch.stack(found[name]).mean() / groups.layout.data
        if dist.get_world_size() > 1:
            dist.all_reduce(mine)
        return mine

    def _crossed(self, clips: int) -> dict[str, Any]:
        """What all ranks sent to other seats in a step over `clips` clips."""
        traffic, edge = self.engine.traffic, self.reference_edge
        mine = [traffic.forward, traffic.backward, 0 if edge is None else edge.sent]
        total = torch.tensor(mine, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        forward, backward, reference = total.tolist()
        per_clip = {"forward": forward / clips, "backward": backward / clips}
        return {"edge_bytes_per_clip": per_clip, "reference_bytes": reference}

    def _monitors(self, collapse: Collapse) -> torch.Tensor:
        """Over all tokens that the predictor's seat saw, on every rank, float64 [len(collapse.names)]."""
        seat, groups = self.seats.placement.seat_of("predictor"), self.seats.of("predictor")
        packed = torch.zeros(len(collapse.names), dtype=torch.float64, device=self.device)
        if groups is not None:
            over = [groups.collection.tp] if groups.layout.sequence else []
            packed = collapse.result([*over, groups.collection.dp])
        if dist.get_world_size() > 1:
            dist.broadcast(packed, seat.first_rank)
        return packed
