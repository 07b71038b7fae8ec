"""The watchdog on small processes of its own: who is named, who speaks, and what is not a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nextvid_mcore.parallel import watchdog

TIMEOUT = 3.0
RANK = """
import sys, time
from pathlib import Path
from nextvid_mcore.parallel import watchdog

def wait_in_a_collective():
    while True:
        time.sleep(0.05)

folder, rank, world, timeout, case = sys.argv[1:]
rank, world, timeout = int(rank), int(world), float(timeout)
watch = watchdog.Watchdog(Path(folder), rank, world, f"encoder, data {rank}", timeout)
watchdog.enter("data loading", 7)
watch.start()
if case == "behind" and rank != 1:
    watchdog.enter("gradient reduction")
if case == "busy":
    for _ in range(40):
        time.sleep(timeout / 10)
        watchdog.progress() if rank else watchdog.enter("evaluation")
    watch.stop()
    sys.exit(0)
if case == "error" and rank != 1:
    time.sleep(1.0)
    watch.peer_lost()
    time.sleep(60)
if case == "own-error" and rank == 0:
    time.sleep(0.5)
    watch.peer_lost()
    watch.stop()
    sys.exit(0)
wait_in_a_collective()
"""


class Ranks:
    def __init__(self, folder: Path, world: int, case: str) -> None:
        self.folder, self.world = folder, world
        root = str(Path(__file__).resolve().parents[2])
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(folder), str(rank), str(world), str(TIMEOUT), case],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": root},
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + 60
        while len(list((folder / "watch").glob("rank*.json"))) < world:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, ranks: list[int]) -> str:
        """What these ranks printed before they ended, within the stated time and with the stated code."""
        deadline = time.monotonic() + TIMEOUT + watchdog.MARGIN
        out = [
            self.processes[rank].communicate(timeout=max(deadline - time.monotonic(), 0))[1] for rank in ranks
        ]
        assert [self.processes[rank].returncode for rank in ranks] == [watchdog.EXIT_LOST] * len(ranks), out
        assert sum(bool(text) for text in out) == 1, f"one speaks for all: {out}"
        return "".join(out)


def test_a_stopped_rank_is_named_with_its_role_and_place(tmp_path: Path):
    with Ranks(tmp_path, 3, "hang") as ranks:
        ranks.processes[1].send_signal(signal.SIGSTOP)
        said = ranks.said([0, 2])
        pid = ranks.processes[1].pid
    assert f"no progress for {TIMEOUT:g} s: rank 1 (encoder, data 1; process {pid} on" in said
    assert "is stopped, last seen in data loading of step 7" in said
    assert "Waiting: ranks 0, 2 in data loading of step 7 (wait_in_a_collective" in said


def test_the_rank_that_is_behind_is_named(tmp_path: Path):
    with Ranks(tmp_path, 3, "behind") as ranks:
        said = ranks.said([0, 1, 2])
    assert "rank 1 (encoder, data 1; process" in said and "is behind, in data loading of step 7" in said
    assert "Waiting: ranks 0, 2 in gradient reduction of step 7" in said


def test_a_dead_rank_is_named_at_once_when_a_collective_fails(tmp_path: Path):
    with Ranks(tmp_path, 2, "error") as ranks:
        ranks.processes[1].kill()
        ranks.processes[1].wait()
        said = ranks.said([0])
    assert "a rank is lost: rank 1 (encoder, data 1; process" in said
    assert "has died, last seen in data loading of step 7" in said


def test_an_error_of_its_own_is_not_blamed_on_others(tmp_path: Path):
    with Ranks(tmp_path, 2, "own-error") as ranks:
        assert ranks.processes[0].communicate(timeout=60)[1] == ""
        assert ranks.processes[0].returncode == 0


def test_slow_is_not_hung(tmp_path: Path):
    """Four times the timeout in one evaluation, with signs of life."""
    with Ranks(tmp_path, 2, "busy") as ranks:
        for process in ranks.processes:
            assert process.wait(timeout=60) == 0
    assert not (tmp_path / "watch").exists()


def test_a_job_suspended_as_a_whole_goes_on(tmp_path: Path):
    with Ranks(tmp_path, 2, "busy") as ranks:
        for process in ranks.processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(TIMEOUT * 1.5)
        for process in ranks.processes:
            process.send_signal(signal.SIGCONT)
        for process in ranks.processes:
            assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_entering_a_part_is_an_assignment(count: int):
    before = watchdog._place
    for _ in range(count):
        watchdog.enter("saving", 9)
    now = watchdog._place
    assert (now.count, now.part, now.step) == (before.count + count, "saving", 9)
    watchdog.enter("evaluation")
    assert watchdog._place.step == 9
