"""Work recorded as a CUDA graph, and what a recording that broke off leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Recording[Made]:
    """A graph, its memory pool, and what a replay writes anew; `reason` is why it broke off, on one line."""

    graph: torch.cuda.CUDAGraph
    pool: Any
    made: Made | None = None
    reason: str | None = None

    def replay(self) -> None:
        self.graph.replay()

    def free(self) -> None:
        """Give its memory back, once nothing of the work is held any more.

        Where CUDA refuses to end a recording, torch leaves its pool open: `reset` alone frees nothing.
        """
        self.made = None
        self.graph.reset()
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # raised where it was ended, and `reset` has freed it
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)


def capture[Made](work: Callable[[], Made]) -> Recording[Made]:
    """Record `work`, which has run before, on the current stream (from the default one on one of torch's).

    Other threads (loader, watchdog) go on calling CUDA meanwhile. What `work` raises is the recording's
    `reason`; its frames, and the memory they hold, are gone.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = None
    here = Recording(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle())
    record = torch.cuda.graph(here.graph, here.pool, stream=stream, capture_error_mode="thread_local")
    try:
        with record:
            here.made = work()
    except Exception as error:
        here.reason = first_reason(error)
    return here


def first_reason(error: BaseException) -> str:
    """One line: CUDA's complaint at a recording's end says nothing of the error that broke it off."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
