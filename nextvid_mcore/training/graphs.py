"""Forward and backward pass of a micro-batch as one CUDA graph.

A ViT-G step launches some ten thousand kernels, and issuing them from Python takes longer than running
them. Masks keep the same number of tokens in every clip, so all shapes of a stage are known: after `WARM`
eager passes the next one is recorded (reference, student, predictor, decoder, losses, backward), and then
replayed on new clips, masks, latents and noise, which are copied to where it reads. What goes round it stays
eager: random draws, the target's encoder, gradient reduction, the update, logs. Under tensor parallelism the
collectives inside the pass are recorded with it.

The eager pass is the same function; a test compares the two. Where a pass can't be recorded (memory, a
kernel that waits for the host) the step begins anew without graphs: training/step.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor

from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models import fp8
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch
from nextvid_mcore.parallel.placement import Placement, recorded, unrecordable
from nextvid_mcore.training import microbatch, monitors

if TYPE_CHECKING:
    from nextvid_mcore.training.engine import Engine, Watch

log = logging.getLogger(__name__)

WARM = 2  # eager passes of a shape before it is recorded: they compile, and reserve workspaces


def refusal(config: RunConfig, placement: Placement) -> str | None:
    """Why this run can't be recorded here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return unrecordable(config, placement)


def wanted(config: RunConfig, placement: Placement) -> bool:
    """Whether micro-batches are to be recorded.

    Raises:
        ConfigError: they shall be (`on`) and can't.
    """
    reason = refusal(config, placement)
    if config.train.cuda_graphs == "on" and reason is not None:
        raise ConfigError(f"train cuda_graphs on: {reason}; use --train.cuda-graphs auto or off")
    return reason is None and recorded(config, placement)


@dataclass(frozen=True)
class Inputs:
    """What a micro-batch's pass reads, on the device."""

    video: Tensor  # uint8 [B, 3, T, H, W]
    tokens: Tensor  # int64 [B, s], of ClipMasks
    latents: Tensor | None  # [B, p, n, C]; with tau and noise None without generation
    tau: Tensor | None  # [B, M, p, K]
    noise: Tensor | None  # [B, M, p, K, n, C]

    def tensors(self) -> list[Tensor]:
        found = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [x for x in found if x is not None]

    def copy(self) -> Inputs:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Inputs(**{name: None if x is None else x.clone() for name, x in fields.items()})

    def fill(self, other: Inputs) -> None:
        torch._foreach_copy_(self.tensors(), other.tensors(), non_blocking=True)


@dataclass
class Recorded:
    """The passes of one shape so far, and the graph once there is one."""

    passes: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: Inputs | None = None
    terms: LossTerms | None = None


class NotRecorded(RuntimeError):
    """A recording failed, for the reason that is the message; a part of it may stand in the gradients."""


class Graphs:
    """The recorded passes of a rank, by shape."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model, self.config = engine, engine.model, engine.config
        self.device = engine.device
        self._recorded: dict[tuple, Recorded] = {}
        self._seen: set[tuple] = set()
        self._said = False
        fp8.cache_weights(self.model.children(), False)

    def run(
        self, clip: ClipBatch, latents: Tensor | None, tau_samples: int, count: int, watch: Watch
    ) -> None:
        """Add the gradient of a micro-batch's loss over `count`; `watch` sees its loss terms.

        latents: of the predicted frames of this rank's share, [B, p, n, C]; None without generation.
        """
        batch = microbatch.make_micro_batch(self.config, clip, tau_samples, self.device)
        share = batch
        if self.engine.shares > 1:
            share = microbatch.make_micro_batch(
                self.config, self.engine.share(clip), tau_samples, self.device
            )
        inputs = self._inputs(clip, batch, share, latents)
        key = (*inputs.video.shape, tau_samples, count)
        if key not in self._recorded:
            self._say_again(key)
            self.clear()  # another stage's graph keeps all its activations
        here = self._recorded.setdefault(key, Recorded())
        if here.graph is None and here.passes < WARM:
            here.passes += 1
            terms = self.pass_(batch, share, inputs, count)
        else:
            if here.graph is None:
                self._record(here, batch, share, inputs, count)
            else:
                here.inputs.fill(inputs)
            here.graph.replay()
            seen = tuple(x.clone() for x in here.terms.moments)  # the next replay writes others there
            terms = dataclasses.replace(here.terms, moments=seen)
        watch(terms, share)

    def _say_again(self, key: tuple) -> None:
        """Once, that shapes take turns: each is forgotten before it is recorded, or soon after."""
        if key in self._seen and not self._said:
            self._said = True
            log.warning(
                "rank %d: micro-batches of several shapes take turns (video %s now), so that few passes are "
                "recorded and most are eager, and slower; give every step of a stage the same shape",
                torch.distributed.get_rank(),
                " x ".join(map(str, key[:5])),
            )
        self._seen.add(key)

    def give_up(self) -> None:
        """Clear, for passes that are eager from now on."""
        self.clear()
        fp8.cache_weights(self.model.children(), True)

    def clear(self) -> None:
        """Forget what was recorded and free its memory."""
        for here in self._recorded.values():
            if here.graph is not None:
                here.graph.reset()
        self._recorded.clear()
        torch.cuda.empty_cache()  # what a graph had nobody else can use

    def pass_(self, batch: MicroBatch, share: MicroBatch, inputs: Inputs, count: int) -> LossTerms:
        """Forward and backward: what is recorded, and the eager pass.

        share: the clips of `batch` that this rank's predictor and decoder take.
        """
        model, engine = self.model, self.engine
        patches = microbatch.patches_of(self.config, inputs.video)
        batch = dataclasses.replace(batch, masks=dataclasses.replace(batch.masks, tokens=inputs.tokens))
        features = None
        if self.config.model.align:
            features = model.reference_features(patches.transpose(0, 1), batch.token_frames, len(patches))
            fp8.update_scales(model.reference)
            features = engine.part(features, dim=1)
        context = model.context(microbatch.with_patches(batch, patches))
        share = dataclasses.replace(
            share,
            masks=dataclasses.replace(share.masks, tokens=engine.part(inputs.tokens, dim=0)),
            features=features,
            latents=inputs.latents,
            draws=None if inputs.tau is None else (inputs.tau, inputs.noise),
        )
        terms = model.losses(engine.hand_over(context), share)
        (terms.total(self.config) / count).backward()
        # the monitors' part here, where the memory of the pass is free again, which nobody else can use later
        terms = terms.detached()
        seen = monitors.moments(terms.z, terms.target, terms.aligned)
        return dataclasses.replace(terms, z=None, target=None, aligned=None, moments=seen)

    def _inputs(
        self, clip: ClipBatch, batch: MicroBatch, share: MicroBatch, latents: Tensor | None
    ) -> Inputs:
        tau, noise = (None, None) if latents is None else share.draw(self.config, latents)
        video = clip.video.to(self.device, non_blocking=True)
        return Inputs(video, batch.masks.tokens, latents, tau, noise)

    def _record(
        self, here: Recorded, batch: MicroBatch, share: MicroBatch, inputs: Inputs, count: int
    ) -> None:
        here.inputs = inputs.copy()
        gc.collect()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # other threads (loader, watchdog) go on calling CUDA meanwhile
        record = torch.cuda.graph(
            graph, pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        )
        reason = None
        try:
            with recordable(), record:
                here.terms = self.pass_(batch, share, here.inputs, count)
        except Exception as error:
            reason = _first_reason(error)
        reason = self._agreed(reason)  # here, where the error's frames no longer hold the pass's memory
        if reason is not None:
            here.terms = None
            gc.collect()
            free(graph, pool, self.device)
            if self.config.train.cuda_graphs == "on":
                raise ConfigError(
                    f"train cuda_graphs on: a micro-batch could not be recorded ({reason}); "
                    "use --train.cuda-graphs auto or off"
                )
            raise NotRecorded(reason)
        here.graph = graph

    def _agreed(self, reason: str | None) -> str | None:
        """Why this rank or another of its tensor ranks could not record: they go on in the same way."""
        group = self.engine.groups.collection.tp
        if group.size() == 1:
            return reason
        failed = torch.tensor(reason is not None, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
        return reason or ("another tensor rank failed" if failed else None)


def free(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Give back a broken recording's memory: where CUDA refuses to end it, torch leaves its pool open."""
    graph.reset()
    with contextlib.suppress(RuntimeError):  # raised where it was ended, and `reset` has freed it
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


def _first_reason(error: BaseException) -> str:
    """One line: CUDA's complaint at a recording's end says nothing of the error that broke it off."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextlib.contextmanager
def recordable() -> Iterator[None]:
    """What megatron-core's sequence parallelism does in a pass, in a form that can be recorded.

    It switches to the tensor rank's random numbers round every block, by way of the host: nothing is drawn
    there (no dropout), so it needn't. And gathered sequences go to one buffer for all, which is dropped when
    a longer one is asked for: a recorded pass gets a buffer of its own.
    """
    tracker, shared = get_cuda_rng_tracker(), parallel_state._GLOBAL_MEMORY_BUFFER
    tracker.fork = contextlib.nullcontext
    parallel_state._GLOBAL_MEMORY_BUFFER = GlobalMemoryBuffer()
    try:
        yield
    finally:
        del tracker.fork
        parallel_state._GLOBAL_MEMORY_BUFFER = shared


def own_stream() -> None:
    """Leave the default stream, which can't be recorded, for good; before any parameter is wrapped."""
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        torch.cuda.set_stream(stream)
