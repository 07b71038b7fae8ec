"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1: a state that can be saved is saved first, other work ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """Told to stop. No `Exception`, as readers of files take those for a file that is broken."""


class Stop:
    """While it is entered, a signal raises `Stopped`; inside `gently` the first one only sets `asked`."""

    def __init__(self, says: bool = True) -> None:
        self.asked, self.says = False, says
        self._gentle = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def _ask(self, number: int, *_: Any) -> None:
        again, self.asked = self.asked, True
        if again or not self._gentle:
            raise Stopped
        if self.says:  # not print: it may have been interrupted itself
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: this step ends, then the state is saved (again: at once)\n".encode())

    def __call__(self) -> bool:
        return self.asked
