"""Whether the GPUs of a group can write and signal in each other's memory: one host, joined by NVLink.

Over PCIe copies take longer than the products that should hide them, and signals can be lost: they are
atomic operations on another GPU's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
PATIENCE = 60.0  # seconds that ranks which have just met wait for one that failed since

Place = tuple[str, str, tuple]  # host, GPU, and what `_surroundings` says


def reason(group: dist.ProcessGroup) -> str | None:
    """Why they can't, the same on every rank, or None; every rank of the group calls this."""
    mine = torch.cuda.current_device()
    places = gathered(group, (socket.gethostname(), _uuid(mine), _surroundings()))
    here = places[group.rank()]
    found = [_unreachable(mine, here, other) for other in places if other != here]
    return next((each for rank in gathered(group, found) for each in rank if each), None)


def gathered(group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """Every rank's, in their order."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


@contextlib.contextmanager
def patience(group: dist.ProcessGroup) -> Iterator[None]:
    """Waits for a key of the group's store give up after `PATIENCE`: its ranks are here, or have failed."""
    store = group.get_group_store()
    before = store.timeout
    store.set_timeout(datetime.timedelta(seconds=PATIENCE))
    try:
        yield
    finally:
        store.set_timeout(before)


def _unreachable(mine: int, here: Place, other: Place) -> str | None:
    """Why GPU `mine` at `here` can't signal in the memory of the GPU at `other`, or None."""
    if other[0] != here[0]:
        return f"its ranks sit on {min(here[0], other[0])} and {max(here[0], other[0])}"
    if other[2] != here[2]:
        return "its processes, in containers of their own or with another TMPDIR each, can't hand over memory"
    number = next((i for i in range(torch.cuda.device_count()) if _uuid(i) == other[1]), None)
    if number is None:
        return "each of its processes sees its own GPU alone (CUDA_VISIBLE_DEVICES)"
    return None if _atomic(mine, number) else f"GPUs {mine} and {number} have no NVLink between them"


def _surroundings() -> tuple:
    """What processes must share: torch hands memory over by sockets in this folder, named by their number."""
    names = (os.environ.get(name) for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))
    numbers = None
    try:
        numbers = os.readlink("/proc/self/ns/pid")  # some sandboxes don't show it
        folder = os.stat(next((name for name in names if name is not None), "/tmp"))
    except OSError:  # torch will say so
        return (numbers,)
    return numbers, folder.st_dev, folder.st_ino


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _atomic(a: int, b: int) -> bool:
    """Whether kernels of GPU a can change GPU b's memory atomically."""
    found = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # another name, another system: nobody has tried it there
        return False
    return driver.cuDeviceGetP2PAttribute(ctypes.byref(found), NATIVE_ATOMICS, a, b) == 0 and found.value == 1
