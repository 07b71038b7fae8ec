"""The whole program in every placement: equal to one process, portable checkpoints, kill -9 of any role.

Real files, real processes, the four stages of Table 8 in six steps: tau 4 -> 1 after step 4, 8 -> 16 frames
after step 5. By default each placement runs once; more of them, and a kill of every rank at every moment,
take long:

    NEXTVID_ALL_CRASHES=1 python -m pytest tests/distributed/test_placements.py
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from jobs import Job, lines
from launch import shared
from safetensors.torch import load_file
from test_convert import convert
from test_pretrain import close, data, pretrain, rows, same_run  # noqa: F401 (data is a fixture)

from nextvid_mcore.parallel import watchdog

ALL = bool(os.environ.get("NEXTVID_ALL_CRASHES"))
LONG = (
    "tiny --train.init-noise 0.02 --train.micro-batch 1 --data.workers 0 --data.fps 25 --model.image-size 32 "
    "--mask.keep 0.5 0.25 --model.encoder.depth 2 --model.decoder.depth 1 --model.predictor.depth 1 "
    "--stages.0.steps 2 --stages.0.batch 4 --stages.1.steps 2 --stages.1.batch 2 --stages.2.steps 1 "
    "--stages.2.batch 2 --stages.3.steps 1 --stages.3.batch 2 --eval.every 3 --eval.samples 5 --eval.batch 2 "
    "--eval.tau-bins 2 --checkpoint.every 2 --checkpoint.keep 0"
)
PLACEMENTS = {  # name -> ranks, settings
    "two": (2, "--parallel.placement two-groups --parallel.edge direct"),
    "two-reference": (2, "--parallel.placement two-groups --parallel.reference generator"),
    "two-dp2-1": (3, "--parallel.placement two-groups --parallel.encoder.data 2"),  # with the bridge
    "three-reference": (
        3,
        "--parallel.placement three-groups --parallel.reference generator --parallel.edge direct",
    ),
    "three-pp2": (
        4,
        "--parallel.placement three-groups --parallel.encoder.pipeline 2 --parallel.edge direct",
    ),
}
MORE = {
    "two-tp2-1": (
        3,
        "--parallel.placement two-groups --parallel.encoder.tensor 2 --parallel.reference generator",
    ),
    "two-pp2-dp2": (
        4,
        "--parallel.placement two-groups --parallel.encoder.pipeline 2 --parallel.generator.data 2 "
        "--train.micro-batch 2",
    ),
    "three-tp2": (4, "--parallel.placement three-groups --parallel.encoder.tensor 2 --parallel.sequence"),
}
THREE_ROLES = "--parallel.placement three-groups --data.max-bad-share 1 --checkpoint.every 1"


def words(data: Path, out: Path, extra: str = "", manifest: str = "train") -> list[str]:  # noqa: F811
    files = f"--data.manifest {data / manifest} --data.eval-manifest {data / 'val'}"
    return f"{LONG} {files} --out {out} {extra}".split()


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory) -> Path:  # noqa: F811
    """An unbroken run on one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert shared(1).run(pretrain, [words(data, out)], timeout=300) == [[0]]
    steps = rows(out / "metrics.jsonl")
    assert [(row["tau"], row["frames"]) for row in steps] == [(4, 8)] * 4 + [(1, 8), (1, 16)]
    return out


def same_training(found: Path, expected: Path) -> None:
    """Losses, norms, monitors and held-out losses equal to 1e-5; what crosses is the placement's own."""
    for file in ("metrics.jsonl", "eval.jsonl"):
        mine, theirs = rows(found / file), rows(expected / file)
        assert len(mine) == len(theirs) > 0
        for a, b in zip(mine, theirs, strict=True):
            for key in ("edge_bytes_per_clip", "reference_bytes"):
                a.pop(key, None), b.pop(key, None)
            assert close(a, b), (found.name, a, b)


def run_all(data: Path, folder: Path, names: dict[str, tuple[int, str]]) -> None:  # noqa: F811
    for ranks in sorted({ranks for ranks, _ in names.values()}):
        mine = {name: extra for name, (count, extra) in names.items() if count == ranks}
        starts = [words(data, folder / name, extra) for name, extra in mine.items()]
        codes = shared(ranks).run(pretrain, starts, timeout=600)
        assert codes == [[0] * len(starts)] * ranks


def test_every_placement_trains_and_evaluates_like_one_process(
    data: Path,  # noqa: F811
    one: Path,
    tmp_path: Path,
):
    names = PLACEMENTS | (MORE if ALL else {})
    run_all(data, tmp_path, names)
    for name, (_, extra) in names.items():
        same_training(tmp_path / name, one)
        for row in rows(tmp_path / name / "metrics.jsonl"):
            there = row["edge_bytes_per_clip"]
            assert there["forward"] >= there["backward"] > 0
            # a direct edge sends no gradient for the reference's features
            features = "edge direct" in extra and "reference generator" not in extra
            assert (there["forward"] > there["backward"]) == features
            assert (row["reference_bytes"] > 0) == ("reference generator" in extra)
    assert all("edge_bytes_per_clip" not in row for row in rows(one / "metrics.jsonl"))


def test_checkpoints_move_between_placements(
    data: Path,  # noqa: F811
    one: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """TP2 colocated, then encoder PP2 | predictor | decoder, then one process: the unbroken run."""
    out = tmp_path / "moved"
    split = "--parallel.encoder.tensor 2 --parallel.sequence"
    first = words(data, out, f"{split} --train.steps 2")
    second = words(data, out, f"{PLACEMENTS['three-pp2'][1]} --train.steps 4")
    assert shared(2).run(pretrain, [first], timeout=300) == [[0]] * 2
    assert shared(4).run(pretrain, [second], timeout=300) == [[0]] * 4
    assert shared(1).run(pretrain, [words(data, out)], timeout=300) == [[0]]
    same_training(out, one)
    assert ["edge_bytes_per_clip" in row for row in rows(out / "metrics.jsonl")] == [False] * 2 + [
        True
    ] * 2 + [False] * 2
    for step in (2, 4, 6):  # saved in the first placement, in the second, in the third
        exported = []
        for run in (out, one):
            saved, target = run / "checkpoints" / f"step_{step:08d}", tmp_path / f"{run.name}_{step}"
            assert convert(saved, "--out", target, "--all", monkeypatch=monkeypatch) == 0
            files = sorted(path.name for path in target.glob("*.safetensors"))
            assert len(files) == 3
            exported.append({(file, k): v for file in files for k, v in load_file(target / file).items()})
        mine, theirs = exported
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-6, msg=str(key))


def test_bad_files_count_once(data: Path, tmp_path: Path):  # noqa: F811
    extra = "--data.max-bad-share 1 --train.steps 3"
    assert shared(1).run(pretrain, [words(data, tmp_path / "one", extra, "bad")]) == [[0]]
    three = f"{extra} {PLACEMENTS['three-reference'][1]}"
    assert shared(3).run(pretrain, [words(data, tmp_path / "three", three, "bad")]) == [[0]] * 3
    one, three = (
        [row["bad_samples"] for row in rows(tmp_path / n / "metrics.jsonl")] for n in ("one", "three")
    )
    assert one == three and sum(one) > 0
    same_training(tmp_path / "three", tmp_path / "one")
    strict = "--data.max-bad-share 0.1 --data.bad-window 4"
    stopped = words(data, tmp_path / "strict", f"{strict} {PLACEMENTS['three-reference'][1]}", "bad")
    assert shared(3).run(pretrain, [stopped]) == [[4]] * 3


def poisoned(role: str, starts: list[list[str]]) -> list[int]:
    """The program with a NaN in the gradient of one role, on its ranks alone, in step 2."""
    from nextvid_mcore.training.step import TrainStep

    take = TrainStep.accumulate

    def accumulate(self, point, clips):
        found = take(self, point, clips)
        if point.step == 1 and role in self.roles:
            self.roles[role].buffers[0].grad_data.view(-1)[0] = float("nan")
        return found

    TrainStep.accumulate = accumulate
    try:
        return pretrain(starts)
    finally:
        TrainStep.accumulate = take


def test_a_step_that_is_not_finite_in_one_role_is_skipped_by_all(data: Path, tmp_path: Path):  # noqa: F811
    """The same rows as with the same fault on one process: nobody moved, and all went on."""
    extra = "--train.steps 4 --eval.every 0"
    roles = ("student", "predictor", "decoder")
    for role in roles:
        line = words(data, tmp_path / f"one-{role}", extra)
        assert shared(1).run(poisoned, role, [line]) == [[0]]
        line = words(data, tmp_path / role, f"{extra} {PLACEMENTS['three-reference'][1]}")
        assert shared(3).run(poisoned, role, [line]) == [[0]] * 3
        found = rows(tmp_path / role / "metrics.jsonl")
        assert [row["skipped"] for row in found] == [0, 1, 0, 0] and found[1]["grad_norm"] is None
        for mine, theirs in zip(found, rows(tmp_path / f"one-{role}" / "metrics.jsonl"), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def kill(job: Job, out: Path, rank: int, step: int) -> None:
    """SIGKILL `rank` while step `step` is taken; the others must end, naming its role."""
    victim: list[int] = []

    def there() -> bool:
        victim[:] = [p for p, e in job.processes().items() if e.get("RANK") == str(rank)]
        return bool(victim)

    job.until(there)
    job.until(lambda: lines(out / "metrics.jsonl") >= step - 1)
    os.kill(job.rank(rank), signal.SIGKILL)
    assert job.wait() != 0


def test_killed_ranks_of_every_role(data: Path, tmp_path: Path):  # noqa: F811
    """Under torchrun, with a broken file among the clips: the same command ends as an unbroken run."""
    out = tmp_path / "killed"
    argv = words(data, out, THREE_ROLES, "bad")
    begun = {1: "predictor", 2: "decoder", 0: "encoder"}
    moments = [2, 4, 6] if not ALL else [1, 2, 3, 4, 5, 6]
    victims = list(begun) * (len(moments) // len(begun))
    for rank, step in zip(victims, moments, strict=True):
        job = Job(argv, 3, tmp_path / "killed.log")
        kill(job, out, rank, step)
        named = f"rank {rank} ({begun[rank]}, tensor 0, pipeline 0, data 0; process"
        assert named in job.text() and "has died" in job.text(), job.text()
    job = Job(argv, 3, tmp_path / "killed.log")
    assert job.wait() == 0, job.text()
    assert "going on after step" in job.text() and "finished: 6 of 6 steps" in job.text()
    unbroken = words(data, tmp_path / "unbroken", THREE_ROLES, "bad")
    assert shared(3).run(pretrain, [unbroken], timeout=300) == [[0]] * 3
    same_run(out, tmp_path / "unbroken")


def test_a_stopped_generator_ends_the_encoder(data: Path, tmp_path: Path):  # noqa: F811
    """SIGSTOP: within parallel.timeout and the watchdog's margin the encoder says who, and ends."""
    timeout = 20
    extra = f"--parallel.placement two-groups --parallel.timeout {timeout}"
    job = Job(words(data, tmp_path / "stopped", extra), 2, tmp_path / "stopped.log")
    job.until(lambda: lines(tmp_path / "stopped" / "metrics.jsonl") >= 2)
    stopped, other = job.rank(1), job.rank(0)
    os.kill(stopped, signal.SIGSTOP)
    try:
        job.until(lambda: other not in job.processes(), timeout + watchdog.MARGIN)
    finally:
        os.kill(stopped, signal.SIGKILL)  # torchrun would, half a minute later
    assert job.wait() != 0
    text = job.text()
    assert f"no progress for {timeout} s: rank 1 (generator, tensor 0, pipeline 0, data 0; process" in text, (
        text
    )
    assert "is stopped, last seen in" in text and "Waiting: rank 0 in" in text
    assert "exitcode  : 6" in text
