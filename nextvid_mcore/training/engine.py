"""Forward and backward over a step's micro-batches, on megatron-core's schedules.

The reference needs no gradient: it runs first, as a forward-only pass of its own over all the step's
micro-batches, and its features wait where the losses are. Then one forward-backward pass (1F1B with
several pipeline stages) carries the student alone, all masks as one sequence.

This engine serves colocated roles; training/separate.py those in groups of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models import fp8
from nextvid_mcore.models.encoder import Encoder
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch, NextVid
from nextvid_mcore.parallel import edges, watchdog
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.schedule import StagePoint
from nextvid_mcore.targets import Target
from nextvid_mcore.training import microbatch
from nextvid_mcore.training.ahead import Ahead, Pending
from nextvid_mcore.training.graphs import Graphs
from nextvid_mcore.training.microbatch import Outline

Watch = Callable[[LossTerms, MicroBatch], None]


@dataclass(frozen=True)
class Work:
    """A micro-batch as the student and as predictor and decoder of this rank take it."""

    student: MicroBatch
    generator: MicroBatch


class StageModel:
    """A pipeline stage as megatron-core's schedules want a model to look.

    They search the model for language-model parts (`decoder.layers`), so they don't get NextVid itself.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, encoder: Encoder) -> None:
        self.config, self.encoder = encoder.config, encoder

    def set_input_tensor(self, tensor: Any) -> None:
        self.encoder.set_input_tensor(tensor)


class Engine:
    """Runs micro-batches through a rank's networks."""

    def __init__(self, model: NextVid, seats: Seats, target: Target | None) -> None:
        """`target` where the flow loss is, else None."""
        self.model, self.seats, self.target = model, seats, target
        self.config = model.run
        self.device = next(model.parameters()).device
        self.groups = seats.of("student") or seats.of("reference") or seats.home
        self.schedule = get_forward_backward_func(self.groups.layout.pipeline, None)
        source, last = seats.placement.encoder.layout, seats.placement.seats[-1].layout
        # replicas of colocated predictor and decoder that share an encoder replica's micro-batch
        self.shares = 1 if seats.placement.separate else last.data // source.data
        self.share_number = self.groups.tensor_rank // (self.groups.layout.tensor // self.shares)
        self.ahead = Ahead(self.device)
        self.graphs: Graphs | None = None  # where micro-batches are recorded
        self.traffic = edges.Traffic()

    def gradients(self, point: StagePoint, clips: Sequence[ClipBatch], watch: Watch) -> None:
        """Accumulate the gradient of the mean loss over the step's micro-batches of this replica.

        `watch` is called with every micro-batch's loss terms where there are losses.
        """
        latents = [self.latents(clip) for clip in clips]
        if self.graphs is not None:  # every one of their passes quantises weights
            watchdog.enter("forward and backward")
            for i, (clip, made) in enumerate(zip(clips, latents, strict=True)):
                ready = made() if made else None
                self.graphs.run(clip, ready, point.stage.tau_samples, len(clips), watch, first=i == 0)
            return
        fp8.quantise_again(self.model.children())
        watchdog.enter("reference pass")
        features = self.reference_features(clips)
        watchdog.enter("forward and backward")

        def works() -> Iterator[Work]:
            for i, clip in enumerate(clips):
                work = self.work(clip, point.stage.tau_samples, features[i] if features else None, latents[i])
                latents[i] = None  # free as soon as it is used
                if features:
                    features[i] = None
                yield work

        self.students(works(), len(clips), len(clips[0].index), watch)

    def draw_ahead(self, outline: Outline) -> None:
        """Draw for the micro-batch that the next step begins with, where the device then waits for the host.

        If another one comes after all, its own numbers are drawn.
        """
        if self.graphs is not None:
            self.graphs.draw_ahead(outline)

    def held_out(
        self, clip: ClipBatch, tau_samples: int, seed: int, ema: bool
    ) -> list[tuple[list[int], LossTerms]]:
        """Sample indices and loss terms of one micro-batch without gradient, [] where there are none.

        ema: with the reference encoder in the student's place.
        """
        fp8.quantise_again(self.model.children())
        features = self.reference_features([clip])
        work = self.work(clip, tau_samples, features[0] if features else None, self.latents(clip), seed)
        found: list[tuple[list[int], LossTerms]] = []
        encoder = self.model.reference if ema and "student" in self.model.holds else None

        def watch(terms: LossTerms, batch: MicroBatch) -> None:
            found.append((batch.index, terms))

        self.students(iter([work]), 1, len(clip.index), watch, encoder, forward_only=True)
        return found

    def reference_features(self, clips: Sequence[ClipBatch]) -> list[Tensor | None]:
        """Features [t * n, B, D] of every micro-batch on the last pipeline stage, else an empty list.

        Without alignment nothing is run, and there are Nones.
        """
        return self.encode(clips) if self.config.model.align else [None] * len(clips)

    def encode(self, clips: Sequence[ClipBatch]) -> list[Tensor]:
        """As `reference_features`, whether the loss needs them or not (online kNN)."""
        t = self.config.model.token_frames(clips[0].video.shape[2])

        def step(iterator: Iterator[ClipBatch], stage: StageModel) -> tuple[Tensor, Callable]:
            clip = next(iterator)
            patches = None
            if self.model.reference.first:
                patches = microbatch.full_patches(self.config, clip, self.device).transpose(0, 1)
            hidden = self.model.reference_features(patches, t, len(clip.index))
            return hidden, lambda out, non_loss_data=False: out

        length = t * self.config.model.tokens_per_frame
        stage = StageModel(self.model.reference)
        features = self.run(step, stage, iter(clips), len(clips), length, len(clips[0].index), True)
        fp8.update_scales(self.model.reference)
        return features

    def students(
        self,
        works: Iterator[Work],
        count: int,
        size: int,
        watch: Watch,
        encoder: Encoder | None = None,
        forward_only: bool = False,
    ) -> None:
        """The pass that carries the student, over `count` micro-batches of `size` clips."""
        first = next(works)  # its length is every one's in the modes that several stages allow

        def step(iterator: Iterator[Work], stage: StageModel) -> tuple[Tensor, Callable]:
            work = next(iterator)
            out = self.model.context(work.student, encoder)
            if not self.model.last:
                return out, lambda x, non_loss_data=False: x
            terms = self.model.losses(self.hand_over(out), work.generator)
            watch(terms, work.generator)
            return terms.total(self.config), lambda loss, non_loss_data=False: (loss, {})

        stage = StageModel(encoder or self.model.student.encoder)
        length = first.student.masks.tokens.shape[1]
        self.run(step, stage, itertools.chain([first], works), count, length, size, forward_only)

    def hand_over(self, context: Tensor) -> Tensor:
        """The student's context as this rank's predictor takes it."""
        if self.shares == 1:
            return context
        source, target = self.model.places["student"], self.model.places["predictor"]
        group = source.groups.tp
        if source.sequence:
            context = gather_from_sequence_parallel_region(
                context, tensor_parallel_output_grad=False, group=group
            )
        context = edges.batch_share(context, self.shares, group)
        context = edges.scale_gradient(context, 1 / self.shares)
        if target.sequence:
            context = scatter_to_sequence_parallel_region(context, target.groups.tp)
        return context

    def latents(self, clip: ClipBatch) -> Pending | None:
        """The target's latents of this rank's share of a clip batch, where it has the decoder."""
        if "decoder" not in self.model.holds:
            return None
        share = self.share(clip)
        return self.ahead.start(lambda: microbatch.predicted_latents(share, self.target, self.device))

    def part(self, x: Tensor, dim: int) -> Tensor:
        """Of a tensor with a clip a place along `dim`, those that predictor and decoder take here."""
        return x.chunk(self.shares, dim)[self.share_number]

    def share(self, clip: ClipBatch) -> ClipBatch:
        """The clips that this rank's predictor and decoder take."""
        if self.shares == 1:
            return clip
        return microbatch.clip_share(clip, self.shares, self.share_number)

    def work(
        self,
        clip: ClipBatch,
        tau_samples: int,
        features: Tensor | None,
        latents: Pending | None,
        seed: int | None = None,
    ) -> Work:
        """What this rank's networks read of a clip batch."""
        outline = Outline.of(clip, tau_samples)
        student = microbatch.make_micro_batch(self.config, outline, self.device, seed)
        if "student" in self.model.holds and self.model.student.encoder.first:
            patches = microbatch.full_patches(self.config, clip, self.device)
            student = microbatch.with_patches(student, patches)
        if not self.model.last:
            return Work(student, student)
        generator = student
        if self.shares > 1:
            mine = outline.share(self.shares, self.share_number)
            generator = microbatch.make_micro_batch(self.config, mine, self.device, seed)
            features = None if features is None else self.part(features, dim=1)
        made = latents() if latents else None
        return Work(student, dataclasses.replace(generator, features=features, latents=made))

    def run(
        self,
        step: Callable,
        stage: StageModel,
        data: Iterator[Any],
        count: int,
        length: int,
        size: int,
        forward_only: bool,
    ) -> list[Any]:
        """One pass of megatron-core's schedule; `length` tokens of `size` clips cross each stage boundary."""
        collection = self.groups.collection
        extra = {}
        if self.groups.layout.pipeline > 1:
            extra["p2p_communicator"] = P2PCommunicator(collection.pp, stage.config)
        return self.schedule(
            forward_step_func=step,
            data_iterator=data,
            model=stage,
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            pg_collection=collection,
            **extra,
        )
