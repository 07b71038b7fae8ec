"""`--profile.steps 10-12`: what every rank's CPU and GPU did in these steps, as OUT/profile/*.json.gz.

Open a file in chrome://tracing or ui.perfetto.dev. Profiled steps are slower; their numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nextvid_mcore.config import ProfileConfig


class StepProfiler:
    """Call `begin` before and `end` after every step, and `close` when the run ends."""

    def __init__(self, config: ProfileConfig, out: Path, rank: int, say: Callable[[str], None]) -> None:
        self.first, self.last = config.span or (0, -1)
        self.folder, self.rank, self.say = out / "profile", rank, say
        self._profile: profile | None = None
        self._step: record_function | None = None
        self._from = 0

    def begin(self, step: int) -> None:
        """Step `step`, counted from 1 as in metrics.jsonl, is about to start."""
        if not self.first <= step <= self.last:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile, self._from = profile(activities=activities), step
            self._profile.start()
        self._step = record_function(f"step {step}")
        self._step.__enter__()

    def end(self, step: int) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if self._profile is not None and step >= self.last:
            self._write(step)

    def _write(self, step: int) -> None:
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps_{self._from}-{step}_rank{self.rank}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        self.say(f"profile of steps {self._from} to {step}: {self.folder}")

    def close(self) -> None:
        """The run ends inside the span: nothing half is written."""
        if self._profile is not None:
            self._step = None
            self._profile.stop()
            self._profile = None
            self.say("the run ended inside profile.steps: no profile was written")
