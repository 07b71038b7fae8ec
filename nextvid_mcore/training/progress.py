"""What a person sees while a run goes on: a bar on a terminal, a line every `log_every` steps elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from nextvid_mcore.training.monitors import Constant

BAR = "{desc}{n_fmt}/{total_fmt} |{bar:10}| {elapsed}<{remaining}{postfix}"  # leaves room for the numbers


def _number(value: float | None) -> str:
    return "off" if value is None else f"{value:.4g}"


class Progress:
    """Shows the rows of `metrics.jsonl`. Silent on every rank but 0.

    Args:
        total: the step at which this run ends.
        step: finished steps.
        enabled: False prints messages only.
    """

    def __init__(
        self, total: int, step: int, log_every: int, enabled: bool, rank: int, stream: TextIO | None = None
    ) -> None:
        self.total, self.log_every, self.rank = total, log_every, rank
        self.stream = stream or sys.stdout
        self.enabled = enabled and rank == 0
        self._constant = Constant()
        self._bar = None
        if self.enabled and self.stream.isatty():
            self._bar = tqdm(total=total, initial=step, file=self.stream, dynamic_ncols=True, bar_format=BAR)

    def step(self, row: Mapping[str, Any]) -> None:
        """One finished step, as the metrics have it."""
        if "z_var" in row and (note := self._constant.note(row["step"], row["z_var"])):
            self.say(note)
        if not self.enabled:
            return
        numbers = {
            "loss": _number(row["loss"]),
            "flow": _number(row["loss_flow"]),
            "align": _number(row["loss_align"]),
            "clips/s": _number(row["clips_per_s"]),
            "lr": f"{row['lr']:.2e}",
        }
        if row["skipped"]:
            numbers["skipped"] = str(row["skipped"])
        if self._bar is not None:
            self._bar.set_description(str(row["stage"]), refresh=False)
            self._bar.set_postfix_str(" ".join(f"{name} {x}" for name, x in numbers.items()), refresh=False)
            with self._read_or_not():
                self._bar.update(row["step"] - self._bar.n)
        elif row["step"] % self.log_every == 0 or row["step"] == self.total:
            text = "  ".join(f"{name} {value}" for name, value in numbers.items())
            self._print(f"step {row['step']}/{self.total}  {row['stage']}  {text}")

    def say(self, text: str) -> None:
        """A message beside the bar, on rank 0."""
        if self.rank != 0:
            return
        if self._bar is not None:
            with self._read_or_not():
                self._bar.write(text, file=self.stream)
        else:
            self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            with self._read_or_not():
                self._bar.close()

    def _print(self, text: str) -> None:
        with self._read_or_not():
            print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def _read_or_not(self) -> Iterator[None]:
        """Who reads may be gone, a terminal that was closed or `| tee` after Ctrl-C: what follows is dropped,
        at the interpreter's exit too, and the run saves.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
