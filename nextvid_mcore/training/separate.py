"""The engine for roles in groups of their own: encoder | predictor and decoder, or three groups.

megatron-core's 1F1B schedule runs over the chain of seats as over pipeline stages. Forward, the encoder's
edge carries the context, already projected to the predictor's width, and the reference's features, in one row
a clip; the predictor's edge carries z. Backward, the gradients of context and z return, scaled by the ratio
of the data replicas (parallel/edges.py). Masks never cross: every seat draws them from (seed, index).

The edges are megatron-core's MultiModulePipelineCommunicator (`parallel.edge bridge`, the default) or, with
`direct`, our own (parallel/direct_edge.py); docs/placement.md compares them.

A reference that is not pipelined is run micro-batch by micro-batch, just before its features are needed: a
pass of its own over the whole step would keep the other seats waiting for it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models.encoder import Encoder
from nextvid_mcore.models.nextvid import LossTerms, NextVid
from nextvid_mcore.parallel import edges, watchdog
from nextvid_mcore.parallel.direct_edge import DirectCommunicator, Sizes
from nextvid_mcore.parallel.edges import Message
from nextvid_mcore.parallel.placement import Seat
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.targets import Target
from nextvid_mcore.training.ahead import Pending
from nextvid_mcore.training.engine import Engine, StageModel, Watch, Work

DIMS = {"s": 0, "b": 1, "h": 2}


class _Seat(StageModel):
    """A stage of the chain of seats: what arrives is a dict by the name of the seat it comes from."""

    def __init__(self, config: Any, encoder: Encoder | None) -> None:
        self.config, self.encoder = config, encoder
        self.arrived: dict[str, Tensor] = {}
        self.features: Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        self.arrived = {k: v[0] if isinstance(v, list) else v for k, v in (tensor or {}).items()}
        self.features = getattr(tensor, "features", None)
        if self.encoder is not None and not self.encoder.first:
            self.encoder.set_input_tensor(self.arrived["encoder"])


class SeparateEngine(Engine):
    """Runs micro-batches through a chain of seats."""

    def __init__(self, model: NextVid, seats: Seats, target: Target | None) -> None:
        super().__init__(model, seats, target)
        placement = seats.placement
        self.seat: Seat = seats.mine[0]
        names = [seat.name for seat in placement.seats]
        self.before = names[names.index(self.seat.name) - 1] if self.seat.name != names[0] else None
        self.leads = seats.home.tensor_rank == 0  # of a replica's tensor ranks only one sends
        self.in_turn = "reference" in self.seat.roles and self.seat.layout.pipeline == 1
        self.features_cross = self.config.model.align and placement.seat_of("reference").name == "encoder"
        self.direct = self.config.parallel.edge == "direct"
        if self.direct:
            timeout = watchdog.collective_timeout(self.config.parallel.timeout)
            self.communicator = DirectCommunicator(seats, model.config, self.device, timeout)
        else:
            self.communicator = MultiModulePipelineCommunicator(
                module_to_grid_map={seat.name: seats.groups[seat.name].grid for seat in placement.seats},
                topology={name: names[i + 1 : i + 2] for i, name in enumerate(names)},
                config=model.config,
                dim_mapping=DIMS,
                module_output_ndim={name: 2 for name in names},
            )
        self.collection = MultiModuleProcessGroupCollection(
            module_pgs={self.seat.name: seats.groups[self.seat.name].collection},
            language_model_module_name=self.seat.name if self.seat.name == names[-1] else None,
        )

    def reference_features(self, clips: Sequence[ClipBatch]) -> list[Tensor | None]:
        """Features where the reference is run ahead, Nones elsewhere."""
        if "reference" in self.seat.roles and not self.in_turn:
            return super().reference_features(clips)
        return [None] * len(clips)

    def students(
        self,
        works: Iterator[Work],
        count: int,
        size: int,
        watch: Watch,
        encoder: Encoder | None = None,
        forward_only: bool = False,
    ) -> None:
        """The pass that carries context, z and their gradients over the chain of seats."""
        stand = self.model.student.encoder if "student" in self.model.holds else None
        stage = _Seat(self.model.config, encoder or stand)
        first = next(works)
        if self.direct:
            self._begin(first, count, size, forward_only)

        def step(iterator: Iterator[Work], stage: _Seat) -> tuple[Any, Callable]:
            work = next(iterator)
            if stage.encoder is not None:
                return self._encode(work, encoder), _nothing
            if "predictor" in self.model.holds:
                out = self._predict(stage, work, watch, count)
            else:
                out = self._decode(stage, work, watch)
            if isinstance(out, dict):
                return out, _nothing
            return out, lambda loss, non_loss_data=False: (loss, {})

        forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=itertools.chain([first], works),
            model=stage,
            num_microbatches=count,
            seq_length=0,  # lengths travel with the tensors
            micro_batch_size=size,
            forward_only=forward_only,
            p2p_communicator=self.communicator,
            pg_collection=self.collection,
        )
        if self.direct:
            self.communicator.finish()

    def _begin(self, first: Work, count: int, size: int, forward_only: bool) -> None:
        """Tell the edges what the pass will carry: every micro-batch is as long as the first."""
        model, names = self.config.model, [seat.name for seat in self.seats.placement.seats]
        context, frames = first.generator.masks.tokens.shape[1], first.generator.token_frames - 1
        features = frames * model.tokens_per_frame * model.encoder.width if self.features_cross else 0
        z = self.config.mask.masks * frames * model.tokens_per_frame
        sizes = [Sizes(0), Sizes(context * model.predictor.width, features), Sizes(z * model.predictor.width)]
        here, layout = names.index(self.seat.name), self.seat.layout
        length = context // (layout.tensor if layout.sequence else 1)
        hidden = (length, size, model.encoder.width)
        after = sizes[here + 1] if here + 1 < len(names) else Sizes(0)
        self.communicator.begin(count, size, sizes[here], after, hidden, forward_only)

    def _encode(self, work: Work, encoder: Encoder | None) -> Message:
        """Hidden states for the next pipeline stage, or what crosses to the predictor."""
        out = self.model.context(work.student, encoder)
        if not self.model.student.encoder.last:
            return Message({self.seat.name: out})
        place = self.model.places["student"]
        if place.sequence:  # the edge wants it whole, and returns the whole gradient to every tensor rank
            out = gather_from_sequence_parallel_region(
                out, tensor_parallel_output_grad=False, group=place.groups.tp
            )
        features = None
        if self.features_cross:  # only predicted frames are compared
            features = work.student.features[self.config.model.tokens_per_frame :]
        return self._leaves(out, features)

    def _leaves(self, x: Tensor, features: Tensor | None = None) -> Message:
        """x [s, B, E] and features [.., B, D] for the next seat."""
        rows = edges.rows(x)
        beside = None if features is None else edges.rows(features.detach()).to(rows.dtype)
        if beside is not None and not self.direct:
            rows, beside = torch.cat([rows, beside], dim=1), None
        message = Message({self.seat.name: rows}, beside)
        self.traffic.goes(message, self.leads)
        return message

    def _arrives(self, stage: _Seat, width: int, length: int | None = None) -> tuple[Tensor, Tensor | None]:
        """`_leaves`' inverse; x's gradient is scaled. length: of x, where features may be packed with it."""
        rows, beside = stage.arrived[self.before], stage.features
        self.traffic.returns(rows, self.leads)
        if length is not None and rows.shape[1] > length * width:
            rows, beside = rows[:, : length * width], rows[:, length * width :].detach()
        x = edges.scale_gradient(edges.tokens(rows, width), self._ratio())
        return x, None if beside is None else edges.tokens(beside, self.config.model.encoder.width)

    def _predict(self, stage: _Seat, work: Work, watch: Watch, count: int) -> Any:
        """The loss where the decoder sits here too, else z for its seat, with alignment's gradient."""
        batch, model = work.generator, self.config.model
        place = self.model.places["predictor"]
        context, features = self._arrives(stage, model.predictor.width, batch.masks.tokens.shape[1])
        if place.sequence:
            context = scatter_to_sequence_parallel_region(context, place.groups.tp)
        if features is not None:  # frame 0's are never compared, and did not cross
            first = features.new_zeros(model.tokens_per_frame, *features.shape[1:])
            batch = _with_features(batch, torch.cat([first, features]))
        if "decoder" in self.model.holds or not model.generate:
            terms = self.model.losses(context, batch)
            watch(terms, batch)
            return terms.total(self.config)
        z = self.model.predict(context, batch)
        share = self.model.shares("predictor", z, batch)
        found = {"z": share.detach()}
        if model.align:
            found |= self.model.alignment(share, batch)
            weight = self.config.loss.align / count
            z = edges.add_loss(z, found["align"].mean(), weight)
        watch(LossTerms(**found), batch)
        return self._leaves(z)

    def _decode(self, stage: _Seat, work: Work, watch: Watch) -> Tensor:
        """The flow loss from z."""
        batch = work.generator
        z, _ = self._arrives(stage, self.config.model.predictor.width)
        z = self.model.shares("decoder", z, batch)
        terms = LossTerms(**self.model.flow_matching(z, batch))
        watch(terms, batch)
        return terms.total(self.config)

    def _ratio(self) -> float:
        """Data replicas of the seat before, over this seat's."""
        layouts = {seat.name: seat.layout for seat in self.seats.placement.seats}
        return layouts[self.before].data / self.seat.layout.data

    def work(
        self,
        clip: ClipBatch,
        tau_samples: int,
        features: Tensor | None,
        latents: Pending | None,
        seed: int | None = None,
    ) -> Work:
        if self.in_turn and self.config.model.align:
            features = super().reference_features([clip])[0]
        work = super().work(clip, tau_samples, features, latents, seed)
        if self.model.last:
            return work
        return Work(_with_features(work.student, features), work.generator)


def _with_features(batch: Any, features: Tensor | None) -> Any:
    return dataclasses.replace(batch, features=features)


def _nothing(out: Any, non_loss_data: bool = False) -> Any:
    return out
