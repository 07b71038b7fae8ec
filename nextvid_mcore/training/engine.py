"""Forward and backward over a step's micro-batches, on megatron-core's schedules.

The reference needs no gradient: it runs first, as a forward-only pass of its own over all the step's
micro-batches, and its features wait where the losses are. Then one forward-backward pass (1F1B with
several pipeline stages) carries the student alone, both masks as one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models.encoder import Encoder
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch, NextVid
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.schedule import StagePoint
from nextvid_mcore.targets import Target
from nextvid_mcore.training import microbatch


class _StageModel:
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

    def __init__(self, model: NextVid, groups: RoleGroups, target: Target | None) -> None:
        """`target` where the flow loss is (last pipeline stage), else None."""
        self.model, self.groups, self.target = model, groups, target
        self.config = model.run
        self.device = next(model.parameters()).device
        self.schedule = get_forward_backward_func(groups.layout.pipeline, None)

    def reference_features(self, clips: Sequence[ClipBatch]) -> list[Tensor | None]:
        """Features [t * n, B, D] of every micro-batch on the last pipeline stage, else an empty list.

        Without alignment nothing is run, and there are Nones.
        """
        if not self.config.model.align:
            return [None] * len(clips)
        t = self.config.model.token_frames(clips[0].video.shape[2])

        def step(iterator: Iterator[ClipBatch], stage: _StageModel) -> tuple[Tensor, Callable]:
            clip = next(iterator)
            patches = None
            if self.model.first:
                patches = microbatch.full_patches(self.config, clip, self.device).transpose(0, 1)
            hidden = self.model.reference_features(patches, t)
            return hidden, lambda out, non_loss_data=False: out

        length = t * self.config.model.tokens_per_frame
        return self._run(step, _StageModel(self.model.reference), clips, length, forward_only=True)

    def gradients(
        self,
        point: StagePoint,
        clips: Sequence[ClipBatch],
        watch: Callable[[LossTerms, MicroBatch], None],
    ) -> None:
        """Accumulate the gradient of the mean loss over the step's micro-batches of this replica.

        `watch` is called with every micro-batch's loss terms on the last pipeline stage.
        """
        features = self.reference_features(clips)
        samples = point.stage.tau_samples

        def batches() -> Iterator[MicroBatch]:
            for i, clip in enumerate(clips):
                batch = self.micro_batch(clip, samples)
                if self.model.last:
                    batch = dataclasses.replace(batch, features=features[i])
                    features[i] = None  # free as soon as it is used
                yield batch

        def step(iterator: Iterator[MicroBatch], stage: _StageModel) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            out = self.model(batch)
            if not self.model.last:
                return out, lambda x: x
            watch(out, batch)
            return out.total(self.config), lambda loss: (loss, {})

        n = self.config.model.tokens_per_frame
        length = self.config.model.token_frames(clips[0].video.shape[2]) - 1
        length *= sum(self.config.mask.counts(n)) if self.config.mask.static else 0
        self._run(
            step,
            _StageModel(self.model.student.encoder),
            batches(),
            length,
            count=len(clips),
            size=len(clips[0].index),
        )

    def micro_batch(self, clip: ClipBatch, tau_samples: int, seed: int | None = None) -> MicroBatch:
        """What this rank's networks read of a clip batch, without the reference's features."""
        batch = microbatch.make_micro_batch(self.config, clip, tau_samples, self.device, seed)
        if self.model.first:
            patches = microbatch.full_patches(self.config, clip, self.device)
            batch = microbatch.with_patches(batch, patches)
        if self.model.last and self.config.model.generate:
            batch = microbatch.with_latents(batch, clip, self.target, self.device)
        return batch

    def _run(
        self,
        step: Callable,
        stage: _StageModel,
        data: Any,
        length: int,
        forward_only: bool = False,
        count: int | None = None,
        size: int | None = None,
    ) -> list[Any]:
        """One pass of megatron-core's schedule; `length` tokens of `size` clips cross each stage boundary."""
        collection = self.groups.collection
        extra = {}
        if self.groups.layout.pipeline > 1:
            extra["p2p_communicator"] = P2PCommunicator(collection.pp, stage.config)
        return self.schedule(
            forward_step_func=step,
            data_iterator=iter(data),
            model=stage,
            num_microbatches=len(data) if count is None else count,
            seq_length=length,
            micro_batch_size=len(data[0].index) if size is None else size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            pg_collection=collection,
            **extra,
        )
