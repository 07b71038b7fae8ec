"""Work without gradient that runs beside the step's own, on a CUDA stream of its own.

The target's encoder waits for memory in its norms where the ViTs keep the tensor cores busy, and nobody
needs its latents before the flow loss: so they are begun before the reference pass.
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
