"""`metrics.jsonl` and `eval.jsonl`: one strict JSON object a line, each step once, whatever happens.

A line is handed to the operating system before the next step starts, so a killed process loses none. A
resumed run first drops the lines after its checkpoint's step (and a torn last line) by writing a new file
and renaming it. Numbers that JSON has no word for (a loss of nan) are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextvid_mcore.config import require

# What a save has cost, in the line of the step after which it began or, in the background, ended.
SAVING = ("save_seconds", "save_host_gib", "save_background_seconds")
# What differs between two equal runs.
TIMINGS = ("clips_per_s", "step_time", "data_time", "memory_gib", "knn_time", "knn_share") + SAVING


def strict(value: Any) -> Any:
    """`value` with every non-finite number replaced by None and tensors of one element by numbers."""
    if isinstance(value, Mapping):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a torn last line. Empty where there is no file."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a killed process can tear the last. Others must be rows of a step."""
    if not path.exists():
        return []
    # What follows the last newline is nothing, or torn. A damaged disk's bytes need not be text.
    lines = path.read_text(errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, IndexError):
            step = None
        require(
            isinstance(step, int),
            f"{path}, line {number} is not JSON with a step: {line[:80]!r}; mend it, or move the file away",
        )
    return lines


class MetricsFile:
    """Appends rows with a `step`; on opening, rows after `step` are cut. One process writes."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._cut(step)
        self._file = open(path, "a", buffering=1)
        self._last: tuple[int, dict[str, Any]] | None = None  # where the last line begins, and its row

    def _cut(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
        text = "".join(line + "\n" for line in kept)
        if text == self.path.read_text():
            return
        scratch = self.path.with_name(self.path.name + ".tmp")
        with open(scratch, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, self.path)

    def write(self, row: Mapping[str, Any]) -> None:
        self._last = self._file.tell(), dict(row)
        self._file.write(json.dumps(strict(row), allow_nan=False) + "\n")

    def amend(self, more: Mapping[str, Any]) -> None:
        """Add to the last line of this start, on the disk; nothing if there is none."""
        if self._last is None:
            return
        begin, row = self._last
        self._file.flush()
        self._file.seek(begin)
        self._file.truncate()
        self.write(row | dict(more))
        self.sync()

    def sync(self) -> None:
        """On the disk: called before a checkpoint, so that no checkpoint is ahead of its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()
