"""Work recorded as a CUDA graph, and what a recording that broke off leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def capture[Made](work: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Any, Made]:
    """The graph of `work`, its memory pool, and what `work` returned, which a replay writes anew.

    It is recorded on the current stream (from the default one, which can't be, on one of torch's), and has
    run before. Other threads go on calling CUDA meanwhile. What `work` raises is raised when its memory has
    been given back.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = None
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool, stream=stream, capture_error_mode="thread_local"):
            made = work()
    except Exception:
        free(graph, pool, torch.device("cuda", torch.cuda.current_device()))
        raise
    return graph, pool, made


def free(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Give back a broken recording's memory: where CUDA refuses to end it, torch leaves its pool open."""
    graph.reset()
    with contextlib.suppress(RuntimeError):  # raised where it was ended, and `reset` has freed it
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


def first_reason(error: BaseException) -> str:
    """One line: CUDA's complaint at a recording's end says nothing of the error that broke it off."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
