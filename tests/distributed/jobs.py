"""The program as users start it, under torchrun, and what a test does to its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

MARK = "NEXTVID_TEST_JOB"
PATIENCE = 240.0  # seconds for anything; a busy machine is slow


def _environ(pid: str) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(pair.decode(errors="replace").split("=", 1) for pair in pairs if b"=" in pair)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


class Job:
    """`torchrun --nproc-per-node nproc -m nextvid_mcore.pretrain *argv` in the background.

    As in a job script with `trap '' USR1`: torchrun ignores SIGUSR1, which a scheduler sends to all.
    """

    def __init__(self, argv: Sequence[str], nproc: int, log: Path) -> None:
        self.mark, self.log, self.seen = uuid.uuid4().hex, log, set[int]()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc), "-m", "nextvid_mcore.pretrain", *argv]
        with open(log, "w") as out:
            self.agent = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            )

    def processes(self) -> dict[int, dict[str, str]]:
        """The environment of every living process of the job, loaders and all."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            environ = _environ(pid)
            if environ.get(MARK) == self.mark and _state(int(pid)) not in "ZX":
                found[int(pid)] = environ
        self.seen |= found.keys()
        return found

    def rank(self, rank: int) -> int:
        """The process of a rank: the child of the launcher with this number."""
        for pid, environ in self.processes().items():
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if environ.get("RANK") == str(rank) and int(parent) == self.agent.pid:
                return pid
        raise AssertionError(f"rank {rank} is not there:\n{self.text()}")

    def text(self) -> str:
        return self.log.read_text()

    def until(self, moment: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait for a moment of the run; it must come before the end, and within `seconds`."""
        deadline = time.monotonic() + seconds
        while not moment():
            assert self.agent.poll() is None, f"the run ended before the moment:\n{self.text()}"
            assert time.monotonic() < deadline, f"the moment did not come:\n{self.text()}"
            time.sleep(0.002)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The launcher's exit code, once no process is left; the others have `seconds` to follow it."""
        try:
            code = self.agent.wait(PATIENCE)
            deadline = time.monotonic() + seconds
            while left := self.processes():
                assert time.monotonic() < deadline, f"left behind: {left.keys()}\n{self.text()}"
                time.sleep(0.05)
        finally:
            self.destroy()
        names = [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in self.seen)]
        assert not names, f"shared memory left behind: {names}"
        return code

    def destroy(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.agent.poll()


def lines(path: Path) -> int:
    """Finished lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
