"""Where a step's time goes: shares of reference, student, predictor, decoder, VAE, optimizer, and gaps.

Marks are CUDA events put into the stream where a part begins, in the forward pass by wrapping the parts'
methods and in the backward pass by hooks on the tensors that part them; the time up to the next mark is the
part's. Gaps are the time in which no kernel ran at all, from a recording of the device's activity.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextvid_mcore.training.step import TrainStep

PARTS = ("reference", "student", "predictor", "decoder", "VAE", "optimizer")


class Parts:
    """Marks of one step, as (part that begins, event)."""

    def __init__(self, step: TrainStep) -> None:
        self.step, self.marks = step, []

    def mark(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((part, event))

    def _wrap(self, owner: Any, name: str, part: str, backward: str | None = None) -> Callable[[], None]:
        """Mark `part` round `owner.name`, and `backward` when the gradient of its result is complete."""
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.marks[-1][0] if self.marks else "other"
            self.mark(part)
            out = inner(*args, **kwargs)
            if backward and isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda grad: self.mark(backward))
            self.mark(before)
            return out

        setattr(owner, name, call)
        return lambda: delattr(owner, name) if name in vars(owner) else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        step, model = self.step, self.step.model
        ahead, stream = step.engine.ahead, step.engine.ahead.stream
        ahead.stream = None  # one part at a time: the target's network in line
        undo = [
            self._wrap(step.engine, "reference_features", "reference"),
            self._wrap(model, "context", "student", backward="student"),
            self._wrap(model, "predict", "predictor", backward="predictor"),
            self._wrap(model, "alignment", "predictor"),
            self._wrap(model, "flow_matching", "decoder"),
            self._wrap(step.optimizers, "step", "optimizer"),
            self._wrap(step.optimizers, "zero_grad", "optimizer"),
        ]
        if step.engine.target is not None:
            undo.append(self._wrap(step.engine.target, "latents", "VAE"))
        # the losses' mean and the backward pass that it starts begin with the decoder
        losses = model.losses

        def then_decoder(*args: Any, **kwargs: Any) -> Any:
            out = losses(*args, **kwargs)
            self.mark("decoder")
            return out

        model.losses = then_decoder
        undo.append(lambda: delattr(model, "losses"))
        try:
            self.mark("other")
            yield
            self.mark("end")
        finally:
            ahead.stream = stream
            for each in undo:
                each()

    def milliseconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (part, start), (_, stop) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += start.elapsed_time(stop)
        return dict(found)


def shares(step: TrainStep, take: Callable[[], Any]) -> dict[str, float]:
    """Each part's share of a step's time on the device; `other` is what no part claims."""
    parts = Parts(step)
    with parts.recording():
        take()
    found = parts.milliseconds()
    total = sum(found.values())
    return {part: found.get(part, 0.0) / total for part in (*PARTS, "other")}


@dataclass(frozen=True)
class Activity:
    """What the device did in some steps.

    idle: share of the time in which nothing ran. kernels: (name, ms a step, calls a step), longest first.
    waits: (ms a step, times a step, kernel before, kernel after) where nothing ran, longest first.
    """

    idle: float
    kernels: list[tuple[str, float, int]]
    waits: list[tuple[float, float, str, str]]


def activity(take: Callable[[], Any], steps: int = 2) -> Activity:
    """Of `steps` calls of `take`, which need not wait for the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recording:
        for _ in range(steps):
            take()
        torch.cuda.synchronize()
    spans, times, calls = [], Counter(), Counter()
    for event in recording.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA or event.duration_ns() == 0:
            continue
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns(), event.name()))
        times[event.name()] += event.duration_ns() / 1e6 / steps
        calls[event.name()] += 1
    spans.sort()
    idle, waits, often = 0, Counter(), Counter()
    end, last = spans[0][0], ""
    for start, stop, name in spans:
        if start > end:
            idle += start - end
            waits[last, name] += (start - end) / 1e6 / steps
            often[last, name] += 1
        if stop > end:
            end, last = stop, name
    return Activity(
        idle / (end - spans[0][0]),
        [(name, ms, calls[name] // steps) for name, ms in times.most_common()],
        [(ms, often[pair] / steps, *pair) for pair, ms in waits.most_common()],
    )
