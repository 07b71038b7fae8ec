"""How long a rank stands in exchanges with other seats, by the clock of its device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Bench


class Stopwatch:
    """Time inside some methods, as the device sees it: between events on a GPU's stream."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.depth = cuda, 0
        self.spans: list[tuple[Any, Any]] = []

    def watch(self, owner: Any, name: str) -> None:
        """Time every call of `owner.name`; calls inside others count once."""
        inner: Callable = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return inner(*args, **kwargs)
            self.depth, begin = 1, self._now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.depth = 0
                self.spans.append((begin, self._now()))

        setattr(owner, name, timed)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """In all, after the device has finished."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(a.elapsed_time(b) for a, b in self.spans) / 1e3
        return sum(b - a for a, b in self.spans)


def watch_exchanges(bench: Bench) -> Stopwatch:
    """A stopwatch on everything in which this rank may wait for another seat."""
    watch, step = Stopwatch(bench.cuda), bench.step
    if bench.placement.separate:
        communicator = step.engine.communicator
        for name in dir(communicator):
            if name.startswith(("send_", "recv_")):
                watch.watch(communicator, name)
        watch.watch(step, "_mean_losses")
        if step.optimizers.send_reference is not None:
            watch.watch(step.optimizers, "send_reference")
    return watch
