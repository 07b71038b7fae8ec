"""Files that can't be decoded: named once in the log, and a limit on how many samples may meet one."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Sequence

from nextvid_mcore.config import ConfigError

logger = logging.getLogger("nextvid.data")


class DataError(ConfigError):
    """The data stops the run. The message is written for the person who started it."""


class BadFileLog:
    """Logs every bad file once in a process's life, with its reason; what NVDEC refuses once a reason."""

    def __init__(self, then: str = "another one of its set takes its place") -> None:
        """`then`: what becomes of the sample."""
        self._then = then
        self._seen: set[str] = set()
        self._reasons: set[str] = set()

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        for path, reason in bad:
            if path not in self._seen:
                self._seen.add(path)
                logger.warning("bad file %s: %s (%s)", path, reason, self._then)

    def refused(self, files: Iterable[tuple[str, str]]) -> None:
        """Whole data sets may be of a codec that NVDEC lacks: one line for all files of a reason."""
        for path, reason in files:
            kind = re.sub(r"\d+", "", reason)
            if kind not in self._reasons:
                self._reasons.add(kind)
                logger.warning(
                    "NVDEC can't read %s: %s (decord does; later files with this reason are only counted, in "
                    "`refused_samples` of metrics.jsonl)",
                    path,
                    reason,
                )


class BadShareGuard:
    """Stops the run when more than `limit` of the last `window` samples met a bad file.

    `update` once a step with counts summed over all ranks: then all ranks stop together, and the state
    (`state_dict`: a short list of numbers, JSON-able) is the same on every rank and in every layout. Save
    it with a checkpoint and a resumed run stops at the very step at which the unbroken one would.
    Before `window` samples were seen the share is taken of `window`, so that one bad file in the first
    step does not stop a run, and a missing disk still does soon.
    """

    def __init__(self, limit: float, window: int) -> None:
        self.limit, self.window = limit, window
        self._steps: deque[tuple[int, int]] = deque()  # (samples, bad) of each step
        self._files: deque[tuple[str, str]] = deque(maxlen=5)

    def update(self, samples: int, bad: int, files: Sequence[tuple[str, str]] = ()) -> None:
        """Count one step. `files`: (path, reason) met by this rank, for the message."""
        self._steps.append((samples, bad))
        self._files.extend(files)
        seen = sum(n for n, _ in self._steps)
        while seen - self._steps[0][0] >= self.window:
            seen -= self._steps.popleft()[0]
        if self.share > self.limit:
            last = "; ".join(f"{path} ({reason})" for path, reason in self._files)
            raise DataError(
                f"{self.share:.1%} of the last {max(seen, self.window)} samples met a file that can't be "
                f"decoded, more than data.max_bad_share {self.limit:.1%}. "
                + (f"The last ones: {last}. " if last else "Other ranks' logs name them. ")
                + "Repair the files, build the manifest with --probe, or raise the limit"
            )

    @property
    def share(self) -> float:
        """Of the samples in the window, those that met a bad file."""
        seen, bad = (sum(column) for column in zip(*self._steps, strict=True)) if self._steps else (0, 0)
        return bad / max(seen, self.window)

    def state_dict(self) -> list[list[int]]:
        return [list(step) for step in self._steps]

    def load_state_dict(self, state: Sequence[Sequence[int]]) -> None:
        self._steps = deque((samples, bad) for samples, bad in state)
