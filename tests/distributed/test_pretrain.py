"""The whole program on real files: layouts agree, a resumed run is the unbroken one, and how runs end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from launch import shared
from PIL import Image
from unit import media

from nextvid_mcore.data.manifest import Item
from nextvid_mcore.training.metrics import TIMINGS, read

SMALL = (
    "tiny --train.init-noise 0.02 --train.micro-batch 1 --data.workers 0 --data.fps 25 --model.image-size 32 "
    "--mask.keep 0.5 0.25 --model.encoder.depth 2 --model.decoder.depth 1 --model.predictor.depth 1 "
    "--stages.0.steps 2 --stages.0.frames 4 --stages.0.batch 4 --stages.1.steps 2 --stages.1.frames 4 "
    "--stages.1.batch 2 --stages.2.steps 1 --stages.2.batch 2 --stages.3.steps 1 --stages.3.frames 8 "
    "--eval.every 2 --eval.samples 5 --eval.batch 2 --eval.tau-bins 2 --checkpoint.every 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two videos and two images, with one held-out video, and a set in which half the files are broken."""
    root = tmp_path_factory.mktemp("data")
    videos = [media.video(root / f"{i}.avi", frames=20 + i) for i in range(3)]
    images = [root / f"{i}.png" for i in range(2)]
    for seed, path in enumerate(images):  # not of one colour: features without variance are all rounding
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(path)
    torn = media.truncated(root / "torn.avi", videos[0], 0.01)
    good = [Item(str(path), "video") for path in videos]
    media.manifest(root / "train", clips=good[:2], pictures=[Item(str(path), "image") for path in images])
    media.manifest(root / "val", clips=good[2:])
    media.manifest(root / "bad", clips=[good[0], Item(str(torn), "video")])
    return root


def words(data: Path, out: Path, extra: str = "", manifest: str = "train") -> list[str]:
    line = (
        f"{SMALL} --data.manifest {data / manifest} --data.eval-manifest {data / 'val'} --out {out} {extra}"
    )
    return line.split()


def micro_batches(*clips: int) -> str:
    """Settings of each stage its own."""
    stages = (f"--stages.{i}.micro-batch {each}" for i, each in enumerate(clips))
    return " ".join(("--train.micro-batch None", *stages))


def pretrain(argvs: list[list[str]]) -> list[int]:
    """Several runs of the program one after the other, in these processes. Their exit codes."""
    from nextvid_mcore import cli, pretrain
    from nextvid_mcore.parallel.groups import init_distributed

    init_distributed()
    cli.PATIENCE = 0.0
    codes = []
    for argv in argvs:
        try:
            codes.append(pretrain.main(argv))
        except SystemExit as ended:
            codes.append(ended.code)
    return codes


def pretrain_with_signals(data: Path, out: Path) -> list[int]:
    """Rank 1 alone gets SIGTERM in step 2, in later starts Ctrl-C in 3 and SIGUSR1 in 4; then to the end.

    Every step must begin as the one before it was told.
    """
    from nextvid_mcore.training.microbatch import Outline
    from nextvid_mcore.training.step import TrainStep

    take, foretold = TrainStep.run, {}
    when = {2: signal.SIGTERM, 3: signal.SIGINT, 4: signal.SIGUSR1}

    def step(self, point, clips, coming):
        if os.environ["RANK"] == "1" and point.step + 1 in when:
            os.kill(os.getpid(), when.pop(point.step + 1))
        outline = Outline.of(clips[0], point.stage.tau_samples)
        assert foretold.get(point.step, outline) == outline
        foretold[point.step + 1] = coming
        return take(self, point, clips, coming)

    TrainStep.run = step
    try:
        codes = pretrain([words(data, out)] * 4)
        assert sorted(foretold) == [1, 2, 3, 4, 5, 6] and foretold[6] is None
        return codes
    finally:
        TrainStep.run = take


def told(line: list[str]) -> tuple[int, str]:
    """The exit code of a run, and the sentence with which it ends."""
    from nextvid_mcore import cli

    said: list[str] = []

    def fail(error, code=cli.EXIT_CONFIG, everywhere=False):
        said.append(str(error))
        raise SystemExit(code)

    with mock.patch.object(cli, "fail", fail):
        (code,) = pretrain([line])
    return code, said[0]


def full_memory(line: list[str], where: str, ranks: tuple[int, ...] = (0, 1)) -> tuple[int, str]:
    """How a run ends that finds no memory on `ranks`: in the step of its second stage (`run`), in another
    method of `TrainStep`, or in one of `Engine`.
    """
    import torch

    from nextvid_mcore.training.engine import Engine
    from nextvid_mcore.training.step import TrainStep

    owner = TrainStep if hasattr(TrainStep, where) else Engine
    take = getattr(owner, where)

    def full(self, *given, **named):
        if int(os.environ["RANK"]) in ranks and (where != "run" or given[0].stage.name == "stable1"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return take(self, *given, **named)

    with mock.patch.object(owner, where, full):
        return told(line)


def without_networks(line: list[str]) -> tuple[int, str]:
    """How a run ends that must not come to building them."""
    with mock.patch("nextvid_mcore.training.loop.TrainStep", side_effect=AssertionError):
        return told(line)


def rows(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read(path)]


def same_run(a: Path, b: Path) -> None:
    """Bit for bit, timings aside."""
    assert rows(a / "metrics.jsonl") == rows(b / "metrics.jsonl")
    assert rows(a / "eval.jsonl") == rows(b / "eval.jsonl")


def close(a: object, b: object) -> bool:
    """Equal up to 1e-5 relative, in every number of nested rows."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-5, abs=1e-8) if isinstance(a, float) else a == b


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory) -> Path:
    """An unbroken run on one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert shared(1).run(pretrain, [words(data, out)]) == [[0]]
    return out


def test_a_run_leaves_what_it_says(whole: Path):
    lines = read(whole / "metrics.jsonl")
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5, 6]
    assert [row["samples"] for row in lines] == [4, 8, 10, 12, 14, 18]
    assert [row["stage"] for row in lines] == ["warmup"] * 2 + ["stable1"] * 2 + ["stable2", "cooldown"]
    assert [row["frames"] for row in lines] == [4, 4, 4, 4, 8, 8]
    assert lines[4]["lr_flow"] == 1.6e-3 and lines[4]["lr"] == 9e-4
    for row in lines:
        assert row["loss"] == pytest.approx(0.5 * row["loss_flow"] + row["loss_align"])
        assert row["grad_norm"] > 0 and row["z_var"] > 0 and row["reference_var"] > 0
        assert -1 <= row["align_cos"] <= 1 and row["bad_samples"] == row["skipped"] == 0
        assert row.keys() >= {"clips_per_s", "step_time", "data_time", "memory_gib"}
    evals = read(whole / "eval.jsonl")
    assert [row["step"] for row in evals] == [2, 4, 6]
    for row in evals:
        assert row["ema"]["loss"] != row["online"]["loss"] and row["samples"] == 5
        assert len(row["ema"]["flow_by_frame"]) == 1 and len(row["ema"]["flow_by_tau"]) == 2
    assert json.loads((whole / "config.json").read_text())["recipe"] == "tiny"
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == [
        f"step_0000000{step}" for step in (2, 4, 6)
    ]
    assert (whole / "plots" / "loss.png").stat().st_size > 1000


def test_layouts_agree_and_a_resumed_run_is_the_unbroken_one(data: Path, whole: Path, tmp_path: Path):
    split = "--parallel.encoder.tensor 2 --parallel.sequence"
    by_stage = "--train.micro-batch None"  # as many as share a step: 2, 1, 1, 2
    starts = [
        words(data, tmp_path / "tensor", split),
        words(data, tmp_path / "again", split + " --train.steps 3"),  # ends inside a stage
        words(data, tmp_path / "again", split + " --train.steps 4"),  # ends at a stage's end
        words(data, tmp_path / "again", split),
        words(data, tmp_path / "again", split),  # nothing left to do
        words(data, tmp_path / "data"),
        words(data, tmp_path / "pipeline", "--parallel.encoder.pipeline 2"),
        words(data, tmp_path / "stages", by_stage + " --train.steps 2"),
        words(data, tmp_path / "stages", by_stage),  # from a stage of 2 clips a pass into one of 1
    ]
    assert shared(2).run(pretrain, starts, timeout=400) == [[0] * 9] * 2
    same_run(tmp_path / "tensor", tmp_path / "again")
    for name in ("tensor", "data", "pipeline", "stages"):
        for file in ("metrics.jsonl", "eval.jsonl"):
            found, expected = rows(tmp_path / name / file), rows(whole / file)
            assert len(found) == len(expected)
            for mine, theirs in zip(found, expected, strict=True):
                assert close(mine, theirs), (name, mine, theirs)


def test_a_signal_to_one_rank_saves_and_ends_all(data: Path, tmp_path: Path):
    codes = shared(2).run(pretrain_with_signals, data, tmp_path / "signalled", timeout=300)
    assert codes == [[143, 130, 138, 0]] * 2
    saved = [path.name for path in sorted((tmp_path / "signalled" / "checkpoints").iterdir())]
    assert saved == ["step_00000003", "step_00000004", "step_00000006"]
    assert shared(2).run(pretrain, [words(data, tmp_path / "unbroken")], timeout=300) == [[0]] * 2
    same_run(tmp_path / "unbroken", tmp_path / "signalled")


def test_full_memory_ends_with_the_setting_to_lower(data: Path, tmp_path: Path):
    two = micro_batches(2, 2, 1, 1)
    lines = {
        "--train.micro-batch 2": "full with micro-batches of 2; lower --train.micro-batch, or try "
        "--parallel.recompute pieces (2.00 GiB more asked for)",  # which overrides the stages'
        f"{two} --parallel.recompute pieces": "--stages.1.micro-batch, or try --parallel.recompute full (",
        "--parallel.recompute full": "micro-batches of 1; split the networks over more ranks",
    }
    for i, (extra, ends) in enumerate(lines.items()):
        out = tmp_path / str(i)
        line = words(data, out, f"{extra} --checkpoint.asynchronous")
        code, said = shared(1).run(full_memory, line, "run", timeout=120)[0]
        assert code == 2 and len(read(out / "metrics.jsonl")) == 2
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]  # was under way
        assert said.startswith("step 3, stage stable1: the GPU's memory is full with") and ends in said
    code, said = shared(1).run(full_memory, words(data, tmp_path / "new"), "_reference_edge")[0]
    assert code == 2 and said.startswith(
        "setting up: the GPU's memory is full before the first clip; end what"
    )
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").glob("metrics*"))


def test_full_memory_in_the_held_out_loss_saves_first(data: Path, whole: Path, tmp_path: Path):
    line = words(data, tmp_path / "run", "--checkpoint.every 100 --checkpoint.keep 0")
    ends = shared(2).run(full_memory, line, "held_out", (1,), timeout=300)  # rank 0 has all it needs
    said = (
        "step 2, rank 1, held-out loss: the GPU's memory is full with 2 clips a pass; lower --eval.batch, or "
        "--train.micro-batch (2.00 GiB more asked for); saved after step 2, from where the run goes on"
    )
    assert ends == [(2, said)] * 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert shared(2).run(pretrain, [line], timeout=300) == [[0]] * 2
    found, expected = rows(tmp_path / "run" / "metrics.jsonl"), rows(whole / "metrics.jsonl")
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert [row["step"] for row in read(tmp_path / "run" / "eval.jsonl")] == [4, 6]
    # ranks that wait for each other inside a pass can't be told: each raises as it is
    split = words(data, tmp_path / "split", "--parallel.encoder.tensor 2 --eval.batch 1")
    for code, said in shared(2).run(full_memory, split, "held_out", timeout=300):
        assert code == 2 and said.startswith("step 2, held-out loss: the GPU's memory is full with 1 clip")
        assert "lower --eval.tau-bins, or" in said and "saved" not in said


def test_how_runs_end(data: Path, whole: Path, tmp_path: Path):
    blown, bad, cool = tmp_path / "blown", tmp_path / "bad", tmp_path / "cool"
    starts = [
        words(data, blown, "--stages.0.lr-start 1e30 --optim.max-skipped 3"),
        words(data, bad, "--data.max-bad-share 0.1 --data.bad-window 4", manifest="bad"),
        words(data, bad, "--data.max-bad-share 1 --train.steps 2", manifest="bad"),
        words(data, cool, f"--init-from {whole} --start-stage cooldown"),
        words(data, tmp_path / "none", f"--init-from {tmp_path}"),
        words(data, whole, "--model.encoder.depth 3"),
    ]
    codes = shared(1).run(pretrain, starts, timeout=400)[0]
    assert codes == [3, 4, 0, 0, 2, 5]

    lines = read(blown / "metrics.jsonl")
    assert [row["skipped"] for row in lines] == [0, 1, 2, 3]
    assert lines[1]["skipped_indices"] == [4, 8] and "skipped_indices" not in lines[0]
    assert lines[1]["grad_norm"] is None
    assert sum(row["bad_samples"] for row in read(bad / "metrics.jsonl")) > 0

    first = read(cool / "metrics.jsonl")
    assert [(row["step"], row["stage"], row["samples"]) for row in first] == [(6, "cooldown", 18)]
    trained, fresh = rows(whole / "metrics.jsonl")[-1]["loss"], rows(whole / "metrics.jsonl")[0]["loss"]
    assert abs(first[0]["loss"] - trained) < 0.2 * abs(fresh - trained)  # the weights came along


def test_a_branch_goes_on_without_its_stage_said_again(data: Path, whole: Path, tmp_path: Path):
    """--train.steps counts from the stage that it began at, then and in the start after."""
    out, stages = tmp_path / "branch", "--stages.3.steps 3"
    begin = f"--init-from {whole} --start-stage cooldown"

    def start(*lines: str) -> list[int]:
        starts = [words(data, out, f"{stages} {line}") for line in lines]
        return shared(1).run(pretrain, starts, timeout=400)[0]

    assert start(f"{begin} --train.steps 1", "--train.steps 2") == [0, 0]
    assert [row["step"] for row in read(out / "metrics.jsonl")] == [6, 7]
    assert start(begin) == [0]
    assert [row["step"] for row in read(out / "metrics.jsonl")] == [6, 7, 8]


def test_data_and_folders_are_looked_at_before_networks_are_built(data: Path, whole: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    ends = {
        "--data.sets no=1": (2, "holds clips, pictures and none of the wanted sets no; name its sets in"),
        f"--data.eval-manifest {tmp_path}": (2, f"{tmp_path} holds no .parquet file; write some with"),
        f"--out {tmp_path}/file/run": (2, f"--out {tmp_path}/file/run: Not a directory; name another folder"),
        f"--out {tmp_path}/gone/run": (5, f"run failed on rank 0: File exists: {tmp_path}/gone"),
    }
    for extra, (code, said) in ends.items():
        found = shared(1).run(without_networks, words(data, tmp_path / "new", extra), timeout=120)[0]
        assert found[0] == code and said in found[1]
    code, said = shared(1).run(told, words(data, whole, "--model.encoder.depth 3"), timeout=120)[0]
    assert code == 5 and said.endswith(
        "2 there and 3 here; set it as it was, or start a new run in another --out"
    )


def test_killed_at_any_moment_the_same_command_goes_on(data: Path, tmp_path: Path):
    """As a program with a loader process, ended by SIGKILL: nothing is left behind, and no number changes."""
    extra = "--data.workers 1 --checkpoint.every 1 --checkpoint.keep 2 --train.micro-batch None"
    command = [sys.executable, "-m", "nextvid_mcore.pretrain", *words(data, tmp_path / "killed", extra)]
    log = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline, "no third step"
        time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.wait()
    while True:  # the loader process ends by itself
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a loader process was left behind"
        time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stage stable1: micro-batches of 2, not 4: a step has 2 clips" in done.stdout
    assert "going on after step" in done.stdout and "finished: 6 of 6 steps" in done.stdout
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2
    assert shared(1).run(pretrain, [words(data, tmp_path / "unbroken", "--train.micro-batch None")]) == [[0]]
    same_run(tmp_path / "unbroken", tmp_path / "killed")
