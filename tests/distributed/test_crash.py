"""Kill -9 any process at any moment, run the same command again: no number changes, nothing is left.

Real programs under torchrun, with loader processes and broken files. By default a few moments and ranks;
every moment with every rank, in several layouts, takes long:

    NEXTVID_ALL_CRASHES=1 python -m pytest tests/distributed/test_crash.py
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Job, lines
from test_pretrain import SMALL, rows, same_run
from unit import media

from nextvid_mcore.data.manifest import Item
from nextvid_mcore.parallel import watchdog

ALL = bool(os.environ.get("NEXTVID_ALL_CRASHES"))
RUN = (  # ten steps; stages end after 3, 6, 8; held-out loss after 4, 8, 10; checkpoints after 2, 4, ...
    f"{SMALL} --stages.0.steps 3 --stages.1.steps 3 --stages.2.steps 2 --stages.3.steps 2 --eval.every 4 "
    "--data.workers 1 --data.max-bad-share 1 --checkpoint.keep 2 --parallel.timeout 120"
)
ASYNC = "--checkpoint.asynchronous"
LAYOUTS = {
    "dp2": "",
    "tp2": "--parallel.encoder.tensor 2 --parallel.sequence",
    "pp2": "--parallel.encoder.pipeline 2",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two whole videos, a torn one, and one held out."""
    root = tmp_path_factory.mktemp("data")
    videos = [media.video(root / f"{i}.avi", frames=20 + i) for i in range(3)]
    torn = media.truncated(root / "torn.avi", videos[0], 0.02)
    media.manifest(root / "train", clips=[Item(str(path), "video") for path in (*videos[:2], torn)])
    media.manifest(root / "val", clips=[Item(str(videos[2]), "video")])
    return root


def start(data: Path, out: Path, extra: str = "") -> Job:
    line = f"{RUN} --data.manifest {data / 'train'} --data.eval-manifest {data / 'val'} --out {out} {extra}"
    return Job(line.split(), 2, out.parent / f"{out.name}.log")


def finished(data: Path, out: Path, extra: str = "") -> Path:
    """A start that must reach the end."""
    job = start(data, out, extra)
    assert job.wait() == 0, job.text()
    assert "finished: 10 of 10 steps" in job.text()
    return out


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory) -> Path:
    out = finished(data, tmp_path_factory.mktemp("unbroken") / "run")
    assert sum(row["bad_samples"] for row in rows(out / "metrics.jsonl")) > 0
    return out


def in_step(out: Path, step: int) -> Callable[[], bool]:
    """Step `step` is being taken."""
    return lambda: lines(out / "metrics.jsonl") >= step - 1


def in_evaluation(out: Path, number: int) -> Callable[[], bool]:
    """The `number`-th held-out loss, after step 4 * number, is being taken."""
    return lambda: lines(out / "metrics.jsonl") >= 4 * number and lines(out / "eval.jsonl") < number


def saving(out: Path) -> Callable[[], bool]:
    """Some checkpoint is being written."""
    return lambda: any((out / "checkpoints").glob(".step_*.partial"))


def kill(job: Job, moment: Callable[[], bool], victim: int | str) -> None:
    """SIGKILL a rank, or the launcher, at a moment. The launcher must end all the others."""
    pids = {}

    def ranks_are_there() -> bool:
        pids.update({int(e["RANK"]): p for p, e in job.processes().items() if "RANK" in e})
        return len(pids) == 2

    job.until(ranks_are_there)
    pid = job.agent.pid if victim == "launcher" else job.rank(victim)
    job.until(moment)
    os.kill(pid, signal.SIGKILL)
    assert job.wait() != 0


def test_killed_again_and_again(data: Path, unbroken: Path, tmp_path: Path):
    """Ranks in a step, while saving (both kinds), in evaluation; the launcher at a stage's boundary."""
    out = tmp_path / "run"
    job = start(data, out)
    kill(job, in_step(out, 2), 1)
    assert "rank 1 (all roles, tensor 0, pipeline 0, data 1; process" in job.text(), job.text()
    assert "has died, last seen in" in job.text() and "exitcode  : 6" in job.text()
    assert not (out / "checkpoints").exists()  # nothing to go on from: the run begins again

    job = start(data, out)
    kill(job, saving(out), 0)
    job = start(data, out, ASYNC)
    kill(job, saving(out), 1)

    job = start(data, out)
    kill(job, in_evaluation(out, 1), 1)
    assert lines(out / "eval.jsonl") == 0

    job = start(data, out)
    kill(job, in_step(out, 7), "launcher")  # step 7 is a new stage's first
    same_run(unbroken, finished(data, out))
    assert "going on after step" in (tmp_path / "run.log").read_text()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000008", "step_00000010"]


def test_the_launcher_dies_before_its_ranks_begin(data: Path, tmp_path: Path):
    """They don't look for its store until that gives up, which takes minutes."""
    job = start(data, tmp_path / "run")
    job.until(lambda: sum("RANK" in e for e in job.processes().values()) == 2)
    job.agent.kill()
    assert job.wait(60) != 0


def test_signals_under_torchrun(data: Path, unbroken: Path, tmp_path: Path):
    """SIGTERM to the launcher while saving, SIGUSR1 to all processes in evaluation: saved, stated codes."""
    out = tmp_path / "run"
    job = start(data, out, ASYNC)
    job.until(saving(out))
    job.agent.terminate()
    assert job.wait() != 0
    assert "SIGTERM: saved after step" in job.text(), job.text()
    job = start(data, out)
    job.until(in_evaluation(out, 1))
    for pid in job.processes():
        os.kill(pid, signal.SIGUSR1)
    assert job.wait() != 0
    assert "SIGUSR1: saved after step 4" in job.text(), job.text()
    assert "exitcode  : 138" in job.text()
    same_run(unbroken, finished(data, out))


def test_a_stopped_rank_ends_the_others_with_its_name(data: Path, tmp_path: Path):
    """SIGSTOP one rank: within parallel.timeout and a margin the other says who, which role, and where."""
    out = tmp_path / "run"
    job = start(data, out, "--parallel.timeout 20 --data.workers 0")
    job.until(in_step(out, 3))
    stopped, other = job.rank(1), job.rank(0)
    os.kill(stopped, signal.SIGSTOP)
    job.until(lambda: other not in job.processes(), 20 + watchdog.MARGIN)
    os.kill(stopped, signal.SIGKILL)  # torchrun would, half a minute later
    assert job.wait() != 0
    text = job.text()
    assert text.count("nextvid_mcore [rank") == 1, text
    assert "no progress for 20 s: rank 1 (all roles, tensor 0, pipeline 0, data 1; process" in text
    assert "is stopped, last seen in" in text and "Waiting: rank 0 in" in text
    assert "exitcode  : 6" in text


@pytest.mark.skipif(not ALL, reason="NEXTVID_ALL_CRASHES=1 runs it")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_at_every_moment(data: Path, tmp_path: Path, layout: str):
    """One run in each layout, killed twenty times."""
    split = LAYOUTS[layout]
    whole, out = finished(data, tmp_path / "whole", split), tmp_path / "run"
    for victim in (0, 1, "launcher"):
        kill(start(data, out, split), in_step(out, 1), victim)
        for extra in ("", ASYNC):
            kill(start(data, out, f"{split} {extra}"), saving(out), victim)
            kill(start(data, out, f"{split} {extra}"), saving(out), victim)
    for victim in (0, 1, "launcher"):
        if lines(out / "metrics.jsonl") < 4:
            kill(start(data, out, split), in_evaluation(out, 1), victim)
        for step in (4, 7, 10):
            if lines(out / "metrics.jsonl") < step:
                kill(start(data, out, split), in_step(out, step), victim)
    same_run(whole, finished(data, out, split))
