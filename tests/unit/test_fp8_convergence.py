"""benchmarks/fp8_convergence.py: how processes share its runs, and what is said of their losses."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nextvid_mcore.data import ClipBatch
from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
from nextvid_mcore.parallel.plan import check
from nextvid_mcore.parallel.seats import build_seats
from nextvid_mcore.recipes import digits, tiny
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.training.monitors import Constant
from nextvid_mcore.training.step import TrainStep

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fp8_convergence
import fp8_verdict
import watched_step
from shared_runs import Board


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "locks"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "locks").mkdir()
    return Board(tmp_path, "found")


def test_the_runs_are_those_of_a_recipe_whose_features_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fp8_convergence.py"])
    config, like = fp8_convergence.make_config(fp8_convergence.parse(), "bf16:0"), digits.digits_32()
    for name in ("stages", "target", "optim", "mask", "loss"):
        mine, theirs = getattr(config, name), getattr(like, name)
        assert mine == (dataclasses.replace(theirs, compile=True) if name == "target" else theirs), name
    for name in ("encoder", "predictor", "decoder", "image_size", "patch_size", "init_std"):
        assert getattr(config.model, name) == getattr(like.model, name), name
    assert config.data.manifest == like.data.manifest and config.train.precision == like.train.precision


def test_a_run_is_taken_once(board: Board) -> None:
    runs = ["a:0", "b:0", "c:0"]
    with board.taken(runs) as first, board.taken(runs) as second:
        assert (first, second) == ("a:0", "b:0")
        board.add({"run": "a:0", "losses": []})
    with board.taken(runs) as third:
        assert third == "b:0"  # it was let go without a result
    board.add({"run": "b:0", "error": "x"})
    with board.taken(runs) as again:
        assert again == "b:0"
    board.add({"run": "b:0", "error": "x"})
    with board.taken(runs) as last:
        assert last == "c:0"
    with board.taken(runs[:2]) as none:
        assert none is None


def test_a_dead_holder_lets_go(board: Board) -> None:
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('', flush=1); "
    )
    code += "input()"
    command = [sys.executable, "-c", code, str(board.locks / "a_0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with board.taken(["a:0"]) as run:
            assert run is None
        holder.kill()
    with board.taken(["a:0"]) as run:
        assert run == "a:0"


def line(run: str, end: float, steps: int = 100) -> dict:
    return {"run": run, "steps": steps, "seconds": 1.0, "losses": [1.0] * 50 + [end] * (steps - 50)}


def test_what_is_said_of_a_recipe() -> None:
    ends = {"bf16": (0.30, 0.32, 0.34, 0.36), "delayed": (0.31, 0.31, 0.36, 0.36), "current": (0.2, 0.2)}
    found = {f"{r}:{s}": line(f"{r}:{s}", x) for r, each in ends.items() for s, x in enumerate(each)}
    found["bf16:0:again"] = line("bf16:0:again", 0.31)
    found["mxfp8:0"] = {"run": "mxfp8:0", "steps": 100, "error": "no such GPU"}
    lines, (delayed, current) = fp8_verdict.summarise(found)
    assert delayed.within and not current.within
    assert (delayed.pairs, delayed.triples, delayed.triples_within) == (4, 4, 4)
    # differences 0.01, -0.01, 0.02, 0: mean 0.005, deviation 0.01291, t of three degrees of freedom 3.182
    assert delayed.difference == pytest.approx(0.005)
    assert delayed.error == pytest.approx(0.01291 / 2, rel=1e-3)
    assert delayed.half == pytest.approx(3.182 * 0.01291 / 2, rel=1e-3)
    text = "\n".join(lines)
    assert "| bf16 | 0.3000 | 0.3200 | 0.3400 | 0.3600 | 0.3300 |" in text
    assert "bf16:0 twice: apart from step 50 on; last 50 by +0.01000" in text
    assert "not finished: mxfp8:0 (no such GPU)" in text
    assert "VERDICT current: 0.20000 over 2 seeds lies OUTSIDE bf16's 0.30000 to 0.36000 (4 seeds)" in text


def test_spikes_are_told_and_short_runs_left_out() -> None:
    found = {f"bf16:{s}": line(f"bf16:{s}", 0.4) for s in range(3)}
    found["bf16:1"]["losses"][97] = 1.3
    found["bf16:2"]["losses"].pop()
    lines, _ = fp8_verdict.summarise(found)
    assert "bf16:1: loss 1.3000 at step 97, round it 0.4000" in lines
    assert fp8_verdict.by_recipe(fp8_verdict.complete(found)).keys() == {"bf16"}
    assert "not finished: bf16:2 (cut off)" in lines


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = {f"{r}:{s}": line(f"{r}:{s}", 0.4 + s / 100) for r in ("bf16", "plain") for s in range(2)}
    _, compared = fp8_verdict.summarise(found)
    assert not math.isnan(compared[0].half)
    fp8_verdict.plot(json.loads(json.dumps(found)), compared, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_faulty_pass_is_told_from_a_sound_one() -> None:
    found = {f"bf16:{s}": line(f"bf16:{s}", 0.4) for s in range(3)}
    for run, second in (("bf16:0", 1.2), ("bf16:1", 0.2)):
        first = {"flow": 1.2, "align": 0.2, "student": math.nan}
        found[run]["again"] = [{"step": 97, "first": first, "second": first | {"flow": second}}]
    first = {"flow": 1.0, "student": math.nan}
    found["bf16:2"]["again"] = [{"step": 5, "first": first, "second": {"flow": 1.0, "student": 2.0}}]
    found["bf16:0"]["again"][0] |= {
        "largest": [[12.0, "decoder.input.weight"]],
        "astray": {"decoder": 0},
        "moved": {"decoder": [0.001, 0.2]},
        "earlier": {"decoder": {"flow": 0.7, "align": 0.2}},
    }
    lines, _ = fp8_verdict.summarise(found)
    assert (
        "bf16:0: at step 97 flow 1.2, align 0.2; with weights of before the update of decoder: flow 0.7, "
        "align 0.2; "
        "largest gradient decoder.input.weight 12; largest change decoder 0.001; weights astray 0"
    ) in lines
    assert "bf16:1: another pass at step 97 gave other numbers: flow 1.2 then 0.2" in lines
    assert "bf16:2: another pass at step 5 gave other numbers: student nan then 2" in lines
    assert "3 passes stood out and were made again: 1 gave the same numbers" in lines


def test_flow_alone_is_compared_where_it_was_written() -> None:
    found = {f"{r}:{s}": line(f"{r}:{s}", 0.4) for r in ("bf16", "delayed") for s in range(3)}
    lines, _ = fp8_verdict.summarise(found)
    assert not any("flow loss alone" in x or "variance" in x for x in lines)  # a file of before
    for run, each in found.items():
        flow = 0.7 + 0.01 * int(run[-1]) + 0.05 * run.startswith("delayed")
        each |= {"flow": [flow] * 100, "z_var": [0.0] * 50 + [0.1 * (1 + int(run[-1]))] * 50}
    lines, _ = fp8_verdict.summarise(found)
    (told,) = [x for x in lines if x.startswith("flow loss alone")]
    assert "VERDICT delayed: 0.76000 over 3 seeds lies OUTSIDE bf16's 0.70000 to 0.72000" in told
    assert "variance of predictions over tokens, last 50: 0.1 to 0.3" in lines
    assert "predictions were one vector (variance below 0.0001) in 50% of the steps" in lines
    assert fp8_verdict.SAME == Constant.SAME  # written twice: the verdict imports no torch


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[TrainStep], Callable], TrainStep]:
    """Five steps of a small network in bf16; `fault` gets the step before its fourth pass and after."""
    config = tiny.tiny().altered(train={"init_noise": 0.05, "precision": "bf16"})
    init_distributed()
    seats = build_seats(check(config, 1))
    seed_trackers(0, seats.home)
    point, size = Schedule(config).at(10), config.model.image_size
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, point.stage.frames, size, size)
    clip = ClipBatch(
        video=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        index=torch.tensor([0]),
        label=torch.tensor([0]),
        static=torch.tensor([False]),
        items=["x"],
    )
    monkeypatch.setattr(watched_step, "EARLY", 2)

    def run(kind: type[TrainStep], fault: Callable[[TrainStep, bool], None]) -> TrainStep:
        step, calls = kind(config, seats), []
        inner = step.engine.gradients

        def faulty(*args: object) -> None:
            calls.append(0)
            if len(calls) == 4:
                fault(step, False)
            inner(*args)
            if len(calls) == 4:
                fault(step, True)

        monkeypatch.setattr(step.engine, "gradients", faulty)
        for _ in range(5):
            step.run(point, [clip])
        return step

    return run


def same_weights(step: TrainStep, other: TrainStep) -> bool:
    pairs = zip(step.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_pass_that_stands_out_is_made_again(watched: Callable) -> None:
    """And the weights go where they would go without it."""

    def fault(step: TrainStep, after: bool) -> None:
        if after:  # one network's gradient goes wrong in one pass
            step.roles["decoder"].buffers[0].grad_data[7] = 1e3

    expected, step = watched(TrainStep, fault), watched(watched_step.WatchedStep, fault)
    assert same_weights(step, expected)
    (each,) = step.again
    first, second = each["first"], each["second"]
    assert first["decoder"] > 999 > second["decoder"] and "earlier" not in each
    assert [name for name, x in first.items() if x == second[name]] == [
        "flow",
        "align",
        "student",
        "predictor",
    ]
    assert {role: len(x) for role, x in step.norms.items()} == {"student": 5, "predictor": 5, "decoder": 5}


def test_a_jump_is_traced_to_a_network(watched: Callable) -> None:
    def fault(step: TrainStep, after: bool) -> None:
        if not after:  # weights that aren't what the optimizer has
            step.model.decoder.output.weight.data += 1

    expected, step = watched(TrainStep, fault), watched(watched_step.WatchedStep, fault)
    assert same_weights(step, expected)
    each = step.again[0]
    usual = each["earlier"]["decoder"]["flow"]
    assert each["first"]["flow"] == each["second"]["flow"] > 1.5 * usual
    assert each["earlier"]["student"]["flow"] > 1.5 * usual
    assert each["earlier"]["student and predictor and decoder"]["flow"] == pytest.approx(usual, rel=0.1)
    wrong = step.model.decoder.output.weight.numel()
    assert each["astray"] == {"student": 0, "predictor": 0, "decoder": wrong}
    lr = Schedule(step.config).at(10).lr
    assert all(0 < largest < 3 * lr for largest, _ in each["moved"].values())
    assert all(name.startswith("decoder.") for _, name in each["largest"][:1])
