"""Forward and backward pass of a micro-batch as one CUDA graph.

A ViT-G step launches some ten thousand kernels, and issuing them from Python takes longer than running
them. Masks keep the same number of tokens in every clip, so all shapes of a stage are known: after `WARM`
eager passes the next step's first one is recorded (reference, student, predictor, decoder, losses, backward),
and then replayed on new clips, masks, latents and noise, which are copied to where it reads. What goes round
it stays eager: random draws, the target's encoder, gradient reduction, the update, logs. Under tensor
parallelism the collectives inside the pass are recorded with it.

The eager pass is the same function, and what is recorded is compared with it before it is used
(training/replay_check.py). Where a pass can't be recorded (memory, a kernel that waits for the host) or comes
out different, the step begins anew without graphs: training/step.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor

from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models import fp8, overlapped
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch
from nextvid_mcore.parallel.placement import Placement, recorded, unrecordable
from nextvid_mcore.recording import Recording, capture
from nextvid_mcore.training import microbatch, monitors
from nextvid_mcore.training.microbatch import Outline
from nextvid_mcore.training.replay_check import ReplayCheck

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


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a micro-batch."""

    batch: MicroBatch
    share: MicroBatch  # the clips that this rank's predictor and decoder take
    draws: tuple[Tensor | None, Tensor | None]  # tau and noise of `share`; None without generation


@dataclass
class Recorded:
    """The passes of one shape so far, and their recording once there is one."""

    passes: int = 0
    earlier: tuple[MicroBatch, MicroBatch] | None = None  # of the last eager pass: the batch and the share
    inputs: Inputs | None = None
    recording: Recording[LossTerms] | None = None

    def replay(self) -> LossTerms:
        self.recording.replay()
        terms = self.recording.made
        seen = tuple(x.clone() for x in terms.moments)  # the next replay writes others there
        return dataclasses.replace(terms, moments=seen)


class NotRecorded(RuntimeError):
    """A recording failed or differs, for the reason that is the message; the gradients may be anything."""


class Graphs:
    """The recorded passes of a rank, by shape."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model, self.config = engine, engine.model, engine.config
        self.device = engine.device
        self._recorded: dict[tuple, Recorded] = {}
        self._seen: set[tuple] = set()
        self._ahead: tuple[Outline, Drawn] | None = None
        self._said = False
        self.say: Callable[[str], None] = log.info
        self._rehearsed = fp8.rehearsals(self.config.fp8)  # passes, before which gradients vanish
        fp8.cache_weights(self.model.children(), False)

    def draw_ahead(self, outline: Outline) -> None:
        """Draw for the micro-batch that `run` is given next, while the device is busy with others."""
        self._ahead = outline, self._draw(outline)

    def _drawn(self, outline: Outline) -> Drawn:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == outline else self._draw(outline)

    def _draw(self, outline: Outline) -> Drawn:
        engine = self.engine
        batch = share = microbatch.make_micro_batch(self.config, outline, self.device)
        if engine.shares > 1:
            mine = outline.share(engine.shares, engine.share_number)
            share = microbatch.make_micro_batch(self.config, mine, self.device)
        if "decoder" not in self.model.holds:
            return Drawn(batch, share, (None, None))
        return Drawn(batch, share, share.draw(self.config, engine.target.channels, self.device))

    def run(
        self,
        clip: ClipBatch,
        latents: Tensor | None,
        tau_samples: int,
        count: int,
        watch: Watch,
        first: bool,
    ) -> None:
        """Add the gradient of a micro-batch's loss over `count`; `watch` sees its loss terms.

        latents: of the predicted frames of this rank's share, [B, p, n, C]; None without generation.
        first: all gradients are zero, as the comparison of a recorded pass wants them.
        """
        drawn = self._drawn(Outline.of(clip, tau_samples))
        batch, share = drawn.batch, drawn.share
        video = clip.video.to(self.device, non_blocking=True)
        inputs = Inputs(video, batch.masks.tokens, latents, *drawn.draws)
        key = (*inputs.video.shape, tau_samples, count)
        if key not in self._recorded:
            self._say_again(key)
            self.clear()  # another stage's graph keeps all its activations
        here = self._recorded.setdefault(key, Recorded())
        if here.recording is not None:
            here.inputs.fill(inputs)
            terms = here.replay()
        elif first and here.passes >= max(WARM, self._rehearsed):
            terms = self._record(here, batch, share, inputs, count)
        else:
            here.passes += 1
            here.earlier = batch, share
            terms = self.pass_(batch, share, inputs, count)
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
            if here.recording is not None:
                here.recording.graph.reset()
        self._recorded.clear()
        torch.cuda.empty_cache()  # what a graph had nobody else can use

    @overlapped.beside()  # which eager passes of a run that records nothing don't do
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

    def _record(
        self, here: Recorded, batch: MicroBatch, share: MicroBatch, inputs: Inputs, count: int
    ) -> LossTerms:
        """Record the pass, compare a replay with an eager pass, and leave the gradients of one replay.

        The eager pass comes first: the recording takes its memory for good.
        """
        check, renew = ReplayCheck(self.model.named_parameters()), fp8.keep_scales(self.model.children())
        terms = self.pass_(batch, share, inputs, count)
        if self._agreed(None if check.eager() else "a gradient is not finite") is not None:
            return terms  # of a step that is skipped: another one will do
        del terms
        check.turn()
        renew()
        self._capture(here, inputs, count)
        here.replay()
        check.replayed()
        renew()
        terms = here.replay()
        found = check.again()
        self.say(f"a recorded pass was compared with an eager one; largest differences: {found}")
        self._unless(found.reason(), here)
        return terms

    def _capture(self, here: Recorded, inputs: Inputs, count: int) -> None:
        here.inputs = inputs.copy()
        gc.collect()
        with recordable():
            # an earlier pass's masks: if more is read of them than `inputs`, the comparison shows it
            here.recording = capture(lambda: self.pass_(*here.earlier, here.inputs, count))
        here.earlier = None
        self._unless(here.recording.reason, here)

    def _unless(self, reason: str | None, here: Recorded) -> None:
        """Keep what was recorded, unless this rank or another of its tensor ranks has a reason not to.

        Raises:
            NotRecorded, ConfigError: there is one; which of the two is `train.cuda_graphs`' choice.
        """
        reason = self._agreed(reason)
        if reason is None:
            return
        gc.collect()
        here.recording.free()
        here.recording = None
        if self.config.train.cuda_graphs == "on":
            raise ConfigError(
                f"train cuda_graphs on: a micro-batch could not be recorded ({reason}); "
                "use --train.cuda-graphs auto or off"
            )
        raise NotRecorded(reason)

    def _agreed(self, reason: str | None) -> str | None:
        """Why this rank or another of its tensor ranks could not record: they go on in the same way."""
        group = self.engine.groups.collection.tp
        if group.size() == 1:
            return reason
        failed = torch.tensor(reason is not None, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
        return reason or ("another tensor rank failed" if failed else None)


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
