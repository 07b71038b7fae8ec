"""What a helper process does first: leave Ctrl-C to its parent, and never outlive it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def start_worker(*_: object) -> None:
    """Also a DataLoader's `worker_init_fn`.

    The kernel ends this process when its parent dies, even if it hangs in a decoder. Outside Linux there
    is torch's own watchdog, which looks between two batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent.pid:  # it died before the call above
        os._exit(1)
