"""One program at a time in a run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nextvid_mcore.training import lock
from nextvid_mcore.training.manifest import CheckpointError

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write("process 1 on moon")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_program_is_refused_by_name(holder, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    said: list[str] = []
    with pytest.raises(CheckpointError, match="is in use by process 1 on moon; end that program"):
        lock.hold(tmp_path, said.append)
    assert said == [f"waiting for process 1 on moon to leave {tmp_path}"]


def test_kill_minus_nine_frees_the_folder(holder, tmp_path: Path):
    holder.kill()
    file = lock.hold(tmp_path, print)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    file.close()
    begin = time.monotonic()
    lock.hold(tmp_path, print).close()
    assert time.monotonic() - begin < lock.PATIENCE  # nothing to wait for


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch):
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    said: list[str] = []
    lock.hold(tmp_path, said.append).close()
    assert said == [f"note: no lock on {tmp_path} (Operation not supported); start only one run in it"]
