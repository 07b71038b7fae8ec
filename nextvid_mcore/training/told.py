"""How a run is told to end: the step under way ends, all ranks save, and the same command goes on from there.

SIGTERM and SIGUSR1 come from schedulers, SIGINT is Ctrl-C, SIGHUP the terminal that was closed. Ctrl-C again
ends at once. A launcher may pass one on that the terminal has sent too, so that what follows within `TWICE`
seconds is the same wish. What a parent has had ignored (nohup's SIGHUP, SIGINT behind `&`) stays so.

torchrun passes its own signals on and kills ranks that are not done after 30 s (torch 2.11). A signal to one
rank ends all of them as well, in their own time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

TWICE = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TERMINAL = (signal.SIGINT, signal.SIGHUP)


class Told:
    """`number`: the first signal that came between `listen` and `close`, or 0.

    Args:
        says: whether this rank says what follows.
    """

    def __init__(self, says: bool) -> None:
        self.number, self._says, self._first = 0, says, 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        kept = [number for number in TERMINAL if signal.getsignal(number) is signal.SIG_IGN]
        for number in (*SIGNALS, *TERMINAL):
            if number not in kept:
                self._before[number] = signal.signal(number, self._take)

    def close(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._first = number, time.monotonic()
            if self._says and number == signal.SIGINT:  # not print: it may have been interrupted itself
                with contextlib.suppress(OSError):  # Ctrl-C has ended `2>&1 | tee` too
                    os.write(2, b"\nCtrl-C: this step ends, then the run is saved (again: ends at once)\n")
        elif number == signal.SIGINT and time.monotonic() - self._first > TWICE:
            raise KeyboardInterrupt
