"""A GPU whose memory is full: one sentence with what ran there, who holds how much, and the setting to lower.

torch's allocator raises its own error; NCCL, cuBLAS and the driver, which can't have what torch keeps, raise
theirs.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist

from nextvid_mcore.config import ConfigError, RunConfig

_WORDS = (
    "CUDA error: out of memory",
    "Failed to CUDA calloc",
    "Cuda failure 2 ",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
TRAINING = "the training's micro-batch"
SETTING_UP = (
    "before the first clip; end what else runs on this GPU, or split the networks over more ranks: "
    "--parallel.encoder.tensor 2, or --parallel.encoder.pipeline 2"
)


class FullMemory(ConfigError):
    """The message is for the person who started the run. everywhere: all ranks raise it together."""

    everywhere = False


def most_gib() -> float:
    """The most memory this process has had: of its GPU, or of the machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def is_full(error: BaseException) -> bool:
    """Whether `error` says that there was no memory left."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in _WORDS)


def account(error: BaseException) -> str:
    """Who holds the memory, and what could not be had."""
    found = []
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        found.append(
            f"{held / 2**30:.1f} of {total / 2**30:.1f} GiB reserved by torch here, "
            f"{(total - free - held) / 2**30:.1f} by CUDA, NCCL and other programs"
        )
    if asked := re.search(r"Tried to allocate ([\d.]+ \w+)", str(error)):
        found.append(f"{asked[1]} more asked for")
    elif not isinstance(error, torch.OutOfMemoryError):
        found.append(next(word for word in _WORDS if word in str(error)).strip())
    return "; ".join(found) or "out of memory"


@contextlib.contextmanager
def told(where: str, ways: str) -> Iterator[None]:
    """Turn a full memory inside into FullMemory: "`where`: the GPU's memory is full `ways` (...)"."""
    try:
        yield
    except RuntimeError as error:
        if not is_full(error):
            raise
        raise FullMemory(f"{where}: the GPU's memory is full {ways} ({account(error)})") from error


def training_ways(config: RunConfig, flag: str, clips: int) -> str:
    """What makes a pass of `clips` clips, which `flag` sets, smaller."""
    mode = config.parallel.recompute
    ways = [f"lower {flag}"] if clips > 1 else []
    if mode != "full":
        ways.append(f"try --parallel.recompute {'pieces' if mode == 'none' else 'full'}")
    return ", or ".join(ways or ["split the networks over more ranks: --parallel.encoder.tensor 2"])


def agreed(action: Callable[[], Any], apart: bool) -> Any:
    """What `action` gives on this rank; where memory is full on any, FullMemory on all of them.

    apart: nothing in `action` waits for another rank. Otherwise those that wait can't be told.
    """
    result, failure = None, None
    try:
        result = action()
    except FullMemory as error:
        if not apart:
            raise
        failure = str(error)
        for frames in (error.__traceback__, error.__cause__ and error.__cause__.__traceback__):
            traceback.clear_frames(frames)  # they hold what filled it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not apart:
        return result
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, said in enumerate(failures):
        if said is not None:
            full = FullMemory(said if len(failures) == 1 else f"rank {rank}, {said}")
            full.everywhere = True
            raise full
    return result
