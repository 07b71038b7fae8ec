"""Runs that several processes share through a folder, on one GPU or on several.

Each takes the next run that is neither finished nor held by another. A run is held by the lock of a file,
which the system lets go when its holder dies; it is finished when its line stands in the folder's file of
results, or two lines that tell of errors.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def read(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """run -> its line of results; of a run that was taken twice the last."""
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {line["run"]: line for line in lines}


class Board:
    """The runs of one folder; the locks lie in the machine's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.results = folder / f"{name}.jsonl"
        mark = hashlib.md5(str(self.results.resolve()).encode()).hexdigest()[:12]
        self.locks = Path(tempfile.gettempdir(), f"{name}-{mark}")
        self.locks.mkdir(parents=True, exist_ok=True)

    def finished(self) -> dict[str, dict[str, Any]]:
        if not self.results.exists():
            return {}
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        tries = Counter(line["run"] for line in lines)
        return {line["run"]: line for line in lines if "error" not in line or tries[line["run"]] > 1}

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Whether `name` could be had; it is kept inside."""
        with (self.locks / name.replace(":", "_")).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked inside would keep it otherwise

    @contextlib.contextmanager
    def taken(self, runs: Sequence[str]) -> Iterator[str | None]:
        """The first of `runs` that is to be had, held inside; None: there is none."""
        for run in runs:
            with self.held(run) as mine:
                if mine and run not in self.finished():
                    yield run
                    return
        yield None

    def add(self, line: dict[str, Any]) -> None:
        with self.results.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(line) + "\n")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_UN)
