"""A rank's own part of a save: its tensors to files, flushed and with checksums. Talks to no other rank.

training/saving.py plans it before and publishes it after; in between it may run in another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nextvid_mcore.training import manifest

Note = Callable[[dict[str, float]], None]


def copied(buckets: list[Any]) -> list[Any]:
    """megatron-core's write buckets with tensors of their own."""
    return [
        (path, name, (plain, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, name, (plain, tensors) in buckets
    ]


class HostMemory:
    """The most host memory this process takes over what it has now, where the kernel counts that."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        except OSError:
            pass

    def gib(self) -> float:
        peak = self._process.memory_info().rss
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        except OSError:
            pass
        return max(0, peak - self._before) / 2**30


def _written(buckets: list[Any], transforms: list[Any]) -> dict[int, Any]:
    """Write megatron-core's buckets, one file each. Its own loop over them drops the reason of a failure."""
    results = {}
    for number, bucket in enumerate(buckets):
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        number, found = write(transforms, number, bucket, None, None, True)
        if isinstance(found, Exception):
            while not isinstance(found, OSError) and found.__context__ is not None:
                found = found.__context__  # of torch's "unexpected pos", the write that failed
            raise found
        results[number] = found
    return results


@dataclass
class Pending:
    """A save that has begun."""

    final: Path
    partial: Path
    content: dict[str, Any]
    request: Any  # megatron-core's AsyncRequest
    buckets: Any
    note: Note | None
    memory: HostMemory
    begin: float = field(default_factory=time.perf_counter)
    thread: threading.Thread | None = None
    error: BaseException | None = None
    files: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """This rank's tensors, flushed, with their checksums. Talks to no other rank."""
        try:
            if self.request.async_fn is not None:
                self.request.async_fn_args[2].put(_written(self.buckets, self.request.async_fn.args[0]))
            self.buckets = None
            own = [path for path in self.partial.iterdir() if path.name.startswith(f"__{dist.get_rank()}_")]
            self.files = {path.name: manifest.fingerprint(path) for path in own}
        except BaseException as error:  # raised by all ranks together, in the main thread
            self.error = error
