"""How long some work takes on the device: recorded as a CUDA graph, and played again."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import torch

WARM = 2  # calls before a recording, and plays before the first that counts


def recorded(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `work`, recorded on the current stream, where its tensors were made.

    Autograd lets the stream of a gradient's tensor wait for the one that computed it; the default stream
    may not wait for one that records (`training.graphs.own_stream`): from there, work without gradients only.
    """
    from nextvid_mcore.recording import capture  # the clone may get onto the path after this file

    for _ in range(WARM):
        work()
    torch.cuda.synchronize()
    recording = capture(work)
    if recording.reason is not None:
        raise RuntimeError(f"it could not be recorded: {recording.reason}")
    return recording.graph


def median(play: Callable[[], object], repeats: int) -> float:
    """Seconds of a play on the device."""
    times = []
    for _ in range(WARM + repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        play()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times[WARM:])[repeats // 2]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of `work`, recorded; without a GPU one call by the clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    graph = recorded(work)
    try:
        return median(graph.replay, repeats)
    finally:
        graph.reset()


def tried(lines: list[str], what: object, figures: Callable[[], str]) -> None:
    """Print a table's next line and keep it in `lines`; one that fails costs no other."""
    try:
        lines.append(figures())
        print(lines[-1], flush=True)
    except Exception:
        print(f"failed: {what}", flush=True)
        traceback.print_exc(limit=-4)
