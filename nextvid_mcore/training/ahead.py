"""What keeps the device busy while it would wait: work beside the step's own, and numbers on their way.

The target's encoder waits for memory in its norms where the ViTs keep the tensor cores busy, and nobody
needs its latents before the flow loss: so they are begun before the reference pass, on a CUDA stream of
their own. And a step's losses are copied to the host before the update, so that who reads them does not
wait for it, but prepares the next step meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pending = Callable[[], Tensor]


class Ahead:
    """Starts work now, or without CUDA when its result is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Tensor]) -> Pending:
        """Begin `work`; what it reads must stay as it is until the returned function was called, once."""
        if self.stream is None:
            return work
        self.stream.wait_stream(torch.cuda.current_stream())
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
