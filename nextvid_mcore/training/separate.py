"""The engine for roles in groups of their own: encoder | predictor and decoder, or three groups.

On megatron-core's own pieces: MultiModulePipelineCommunicator carries one tensor over each edge, and the
1F1B schedule runs over the chain of seats as over pipeline stages. Forward, the encoder's edge carries the
context, already projected to the predictor's width, and the reference's features, in one row a clip; the
predictor's edge carries z. Backward, their gradients return, scaled by the ratio of the data replicas
(parallel/edges.py). Masks never cross: every seat draws them from (seed, index).

A reference that is not pipelined is run micro-batch by micro-batch, just before its features are needed: a
pass of its own over the whole step would keep the other seats waiting for it.
"""

from __future__ import annotations

import dataclasses
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
from nextvid_mcore.parallel import edges
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

    def set_input_tensor(self, tensor: Any) -> None:
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        self.arrived = {k: v[0] if isinstance(v, list) else v for k, v in (tensor or {}).items()}
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
        self.communicator = MultiModulePipelineCommunicator(
            module_to_grid_map={seat.name: seats.groups[seat.name].grid for seat in placement.seats},
            topology={name: names[i + 1 : i + 2] for i, name in enumerate(names)},
            config=model.config,
            dim_mapping=DIMS,
            module_output_ndim={"encoder": 2},
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

        def step(iterator: Iterator[Work], stage: _Seat) -> tuple[Any, Callable]:
            work = next(iterator)
            if stage.encoder is not None:
                return {self.seat.name: self._encode(work, encoder)}, _nothing
            if "predictor" in self.model.holds:
                out = self._predict(stage.arrived[self.before], work, watch, count)
            else:
                out = self._decode(stage.arrived[self.before], work, watch)
            if isinstance(out, dict):
                return out, _nothing
            return out, lambda loss, non_loss_data=False: (loss, {})

        forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=works,
            model=stage,
            num_microbatches=count,
            seq_length=0,  # lengths travel with the tensors
            micro_batch_size=size,
            forward_only=forward_only,
            p2p_communicator=self.communicator,
            pg_collection=self.collection,
        )

    def _encode(self, work: Work, encoder: Encoder | None) -> Tensor:
        """Hidden states for the next pipeline stage, or what crosses to the predictor."""
        out = self.model.context(work.student, encoder)
        if not self.model.student.encoder.last:
            return out
        place = self.model.places["student"]
        if place.sequence:  # the edge wants it whole, and returns the whole gradient to every tensor rank
            out = gather_from_sequence_parallel_region(
                out, tensor_parallel_output_grad=False, group=place.groups.tp
            )
        features = None
        if self.features_cross:  # only predicted frames are compared
            features = work.student.features[self.config.model.tokens_per_frame :]
        packed = edges.pack(out, features)
        self.traffic.goes(packed, self.leads)
        return packed

    def _predict(self, packed: Tensor, work: Work, watch: Watch, count: int) -> Any:
        """The loss where the decoder sits here too, else z for its seat, with alignment's gradient."""
        batch, model = work.generator, self.config.model
        place = self.model.places["predictor"]
        self.traffic.returns(packed, self.leads)
        context, features = edges.unpack(
            packed, batch.masks.tokens.shape[1], model.predictor.width, model.encoder.width
        )
        context = edges.scale_gradient(context, self._ratio())
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
        self.traffic.goes(z, self.leads)
        return {self.seat.name: z}

    def _decode(self, z: Tensor, work: Work, watch: Watch) -> Tensor:
        """The flow loss from z [queries, B, E]."""
        batch = work.generator
        self.traffic.returns(z, self.leads)
        z = self.model.shares("decoder", edges.scale_gradient(z, self._ratio()), batch)
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
