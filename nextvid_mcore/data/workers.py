"""How worker processes meet signals: their parent decides when they end, and they never outlive it.

A scheduler that stops a job signals all its processes (Slurm's SIGUSR1 and SIGTERM), a terminal the
whole group (Ctrl-C). The training process then finishes its step and saves, and its loader must live
until it is closed. So workers block these signals, and end on a SIGTERM from their parent alone.

They end at once, as forked processes do and spawned ones don't: a thread that is inside torch when the
interpreter shuts down (the one that hands batches to the parent, say) would abort the process.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

PR_SET_PDEATHSIG = 1
HELD = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@contextmanager
def shield() -> Iterator[None]:
    """Processes started inside are born with these signals blocked, before they run a line of ours."""
    resource_tracker.ensure_running()  # its start unblocks SIGINT and SIGTERM, in this process too
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_at_parents_death(number: signal.Signals) -> None:
    """The kernel sends this process `number` when its parent dies. Linux only; nothing elsewhere."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, number) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def orphaned() -> bool:
    """Whether the parent died before `signal_at_parents_death` was called: process 1 has taken its place.

    In a container a launcher may itself be process 1, as a Python program.
    """
    try:
        return os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False


def start_worker(*_: object) -> None:
    """The first thing a worker does; also a DataLoader's `worker_init_fn`.

    On Linux the kernel ends this process when its parent dies, even if it hangs in a decoder. Elsewhere
    there is torch's own watchdog, which looks between two batches, and signals act as they always do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        atexit.register(os._exit, 0)  # called last, after what was registered later
    if sys.platform != "linux" or parent is None:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()
    signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before the call above
        os._exit(1)


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
