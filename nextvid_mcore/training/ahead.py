"""What keeps the device busy while it would wait: work beside the step's own, and numbers on their way.

The target's encoder waits for memory in its norms where the ViTs keep the tensor cores busy, and nobody
needs its latents before the flow loss: so they are begun before the reference pass, on a CUDA stream of
their own. They wait for nothing but the clips: a step's first ones are made while the last step's update
still moves memory. And a step's losses are copied to the host before the update, so that who reads them does
not wait for it, but prepares the next step meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pending = Callable[[], Tensor]


class Ahead:
    """Starts work now, or without CUDA when its result is asked for."""

    def __init__(self, device: torch.device) -> None:
        """early: work may begin before what the step's stream was given has ended."""
        self.early = False
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # where networks were filled

    def start(self, work: Callable[[], Tensor], after: Sequence[torch.cuda.Event] | None = None) -> Pending:
        """Begin `work`; what it reads must stay as it is until the returned function was called, once.

        after: events behind which all lies that `work` reads; None: behind all that the current stream was
        given. What it writes is its own: the allocator gives it memory of this stream, and its result's
        memory away only when the stream that asked for it is done with it.
        """
        if self.stream is None:
            return work
        if after is None or not self.early:
            self.stream.wait_stream(torch.cuda.current_stream())
        else:
            for event in after:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            made = work()
            done = self.stream.record_event()

        def result() -> Tensor:
            current = torch.cuda.current_stream()
            current.wait_event(done)
            made.record_stream(current)
            return made

        return result


class Report:
    """A few numbers on the way to the host, from when it is made."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.copied = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()

    def read(self) -> list[float]:
        """Waits for the copy, not for what the device was given since."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()
