"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1: a state that can be saved is saved first, other work ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

TWICE = 1.0  # seconds: Ctrl-C reaches a rank from the terminal and from its launcher, and is one wish
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """Told to stop. No `Exception`, as readers of files take those for a file that is broken."""


class Stop:
    """While it is entered, a signal raises `Stopped`; inside `gently` the first one only sets `asked`."""

    def __init__(self, says: bool = True) -> None:
        self.asked, self.says = False, says
        self._gentle, self._first = False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._stderr = os.dup(2)  # while a file is decoded, 2 is somewhere else
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._stderr)

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def _ask(self, number: int, *_: Any) -> None:
        again = self.asked and time.monotonic() - self._first > TWICE
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
        elif not again:
            return
        if again or not self._gentle:
            raise Stopped
        if self.says:  # not print: it may have been interrupted itself
            name = signal.Signals(number).name
            said = f"\n{name}: this step ends, then the state is saved (again: at once)\n"
            with contextlib.suppress(OSError):  # Ctrl-C has ended `2>&1 | tee` too
                os.write(self._stderr, said.encode())

    def __call__(self) -> bool:
        return self.asked
