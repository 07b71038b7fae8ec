"""Weights & Biases as a sink that can't hold up a run: a thread of its own does all the talking.

`wandb.init` may wait minutes for a network, so it happens in the thread; rows queue up meanwhile and are
dropped, with one message, when the queue is full. Whatever fails is said once and training goes on.
Offline by default: `wandb sync RUN_DIR/wandb/offline-run-*` uploads later.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nextvid_mcore.config import WandbConfig

INIT_TIMEOUT = 20  # seconds that wandb.init may wait for its server
CLOSE_TIMEOUT = 10.0  # seconds that the end of the run waits for the thread


class WandbSink:
    """Rows of rank 0 to wandb. Does nothing when `config.enabled` is False."""

    def __init__(
        self,
        config: WandbConfig,
        out: Path,
        settings: Mapping[str, Any],
        say: Callable[[str], None] = print,
        capacity: int = 10_000,
    ) -> None:
        self._config, self._out, self._settings, self._say = config, out, settings, say
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(capacity)
        self._broken = not config.enabled
        self._thread: threading.Thread | None = None
        if config.enabled:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def _fail(self, reason: object) -> None:
        if not self._broken:
            self._broken = True
            self._say(f"wandb is off for the rest of this run: {reason}")

    def _run_id(self) -> str:
        """One id for the life of the run directory, so that a resumed run goes on in the same chart."""
        path = self._out / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12])
        return path.read_text().strip()

    def _work(self) -> None:
        try:
            import wandb

            run = wandb.init(
                project=self._config.project,
                name=self._config.name or self._out.name,
                mode=self._config.mode,
                id=self._run_id(),
                resume="allow",
                dir=str(self._out),
                config=dict(self._settings),
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT),
            )
            while (row := self._rows.get()) is not None:
                run.log(row, step=row["step"])
            run.finish()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Queue a row that has a `step`. Never waits."""
        if self._broken:
            return
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            self._fail(f"{self._rows.maxsize} rows are waiting")

    def close(self) -> None:
        """Let the thread finish what it has, for a short while."""
        if self._thread is None or self._broken:
            return
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._fail(f"still sending after {CLOSE_TIMEOUT:g} s; `wandb sync` can finish it")
