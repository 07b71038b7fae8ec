"""Scaling laws: a law that made the losses is found again; runs that can't be compared are told apart."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tool import TOOLS, tool

from nextvid_mcore import cli, flops, recipes
from nextvid_mcore.config import RunConfig, SetConfig, TransformerShape
from nextvid_mcore.evaluation.scaling import (
    Cost,
    End,
    Law,
    best,
    end,
    fit,
    lacking,
    training_flops,
    without_one,
)
from nextvid_mcore.recipes.digits import stages

LAW = Law(E=0.4, A=30.0, alpha=0.35, B=8.0, beta=0.28)
WIDTHS, STEPS = (64, 128, 256, 384), (100, 200, 400, 800)


def run(width: int, steps: int) -> RunConfig:
    config = recipes.get("digits_32")
    shape = TransformerShape(width, 4, width // 32, 4 * width)
    return config.altered(model={"encoder": shape}, stages=stages(steps))


def size(config: RunConfig) -> int:
    return flops.parameters(config.model, flops.target_channels(config)).encoder


def write(folder: Path, config: RunConfig, loss: float | None, step: int | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    done = step or sum(stage.steps for stage in config.stages)
    rows = [{"step": at, "ema": {"loss_flow": loss, "loss_align": 0.1}} for at in (done // 2, done)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def ladder(root: Path, noise: float = 0.0) -> list[Path]:
    random, found = np.random.default_rng(0), []
    for width in WIDTHS:
        for steps in STEPS:
            config = run(width, steps)
            loss = LAW.loss(size(config), steps * 64) * (1 + noise * random.standard_normal())
            found.append(write(root / f"w{width}_s{steps}", config, loss))
    return found


def ends(folders: list[Path]) -> list[End]:
    return tool("scaling_laws").read(folders, "loss_flow")


def test_the_law_of_exact_losses_is_found(tmp_path):
    law = fit(ends(ladder(tmp_path)))
    for key in ("E", "alpha", "beta"):
        assert getattr(law, key) == pytest.approx(getattr(LAW, key), rel=0.02), law
    assert law.loss(1e6, 1e6) == pytest.approx(LAW.loss(1e6, 1e6), rel=1e-3)  # a 20th beyond


def test_an_outlier_does_not_carry_the_law_away(tmp_path):
    found = ends(ladder(tmp_path, noise=1e-3))
    bad = [dataclasses.replace(e, loss=1.3 * e.loss) if i == 7 else e for i, e in enumerate(found)]
    law = fit(bad)
    others = without_one(bad, law)
    for e in (x for i, x in enumerate(found) if i != 7):
        assert law.loss(e.parameters, e.clips) == pytest.approx(e.loss, rel=0.01)
    assert len(others) == len(bad) and min(o.beta for o in others) < law.beta < max(o.beta for o in others)


def test_flops_of_a_run_are_those_of_its_stages():
    config = run(128, 100)
    one, two, three = config.stages
    longer = config.altered(stages=(one, dataclasses.replace(two, frames=8, batch=32), three))
    clip = [flops.clip_flops(longer, stage, executed=True).total for stage in longer.stages]
    assert clip[1] < clip[0]
    whole = sum(s.steps * s.batch * c for s, c in zip(longer.stages, clip, strict=True))
    assert training_flops(longer, 100) == pytest.approx(whole)
    assert training_flops(longer, one.steps + 3) == pytest.approx(one.steps * 64 * clip[0] + 3 * 32 * clip[1])


def test_the_best_size_is_where_the_formula_has_it():
    """Of clips that cost in proportion to N it has a closed form."""
    cost, budget = Cost(fixed=0.0, each=6e3), 1e17
    exact = (LAW.alpha * LAW.A / (LAW.beta * LAW.B) * (budget / 6e3) ** LAW.beta) ** (
        1 / (LAW.alpha + LAW.beta)
    )
    found = best(LAW, cost, budget, (exact / 50, exact * 50))
    assert found.parameters == pytest.approx(exact, rel=0.005) and not found.edge
    assert found.parameters * found.clips * 6e3 == pytest.approx(budget)
    assert best(LAW, cost, budget, (exact * 2, exact * 50)).edge


def test_what_a_clip_costs_beside_the_encoder(tmp_path):
    found = ends(ladder(tmp_path))
    cost = Cost.of(found)
    assert cost.fixed > 0  # predictor and decoder are the same in all
    for e in found:
        assert cost.clip(e.parameters) == pytest.approx(e.flops / e.clips, rel=0.15)


def test_ends_that_do_not_count():
    config, row = run(128, 100), {"ema": {"loss_flow": 0.5}}
    assert end("a", config, [row | {"step": 100}], "loss_flow").left_out is None
    assert "of step 60 of 100" in end("a", config, [row | {"step": 60}], "loss_flow").left_out
    assert (
        "not a number" in end("a", config, [{"step": 100, "ema": {"loss_flow": None}}], "loss_flow").left_out
    )
    assert "--eval.every" in end("a", config, [], "loss_flow").left_out
    one = end("a", config, [row | {"step": 100}], "loss_flow")
    assert "1 runs count" in lacking([one]) and "1 different sizes" in lacking([one] * 6)


def test_an_exponent_that_the_runs_do_not_settle_is_told_as_such(tmp_path):
    module, found = tool("scaling_laws"), ends(ladder(tmp_path))
    told = module.told(LAW, without_one(found, fit(found)))
    assert len(told) == 4 and not any("settle" in line for line in told)
    flat = [dataclasses.replace(e, loss=LAW.loss(1e6, e.clips)) for e in found]  # no size matters
    law = fit(flat)
    assert any(
        line.startswith("  alpha") and "settle" in line for line in module.told(law, without_one(flat, law))
    )


def call(monkeypatch, *arguments: object) -> int:
    """The tool's exit status."""
    monkeypatch.setattr(sys, "argv", ["scaling_laws.py", *map(str, arguments)])
    return tool("scaling_laws").main()


def test_the_tool_draws_and_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = ladder(tmp_path / "runs")
    write(tmp_path / "runs" / "cut", run(96, 100), 0.9, step=60)
    assert call(monkeypatch, *folders, "runs/cut", "--json", "law.json", "--budget", "1e15") == 0
    said = capsys.readouterr().out
    assert "cut" in said and "left out: its last held-out loss is of step 60 of 100" in said
    assert "\n 1.00e+15 " in said and (tmp_path / "scaling.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "law.json").read_text())
    assert written["law"]["beta"] == pytest.approx(LAW.beta, rel=0.02) and len(written["runs"]) == 17
    assert call(monkeypatch, *folders[:3]) == 0
    assert "no law: 3 runs count, and a law of five numbers wants 6" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", run(128, 100), 0.5)
    write(tmp_path / "b", run(128, 100).altered(eval={"samples": 64}), 0.5)
    held_out = {  # what is drawn from it, in what shares and at what pace, and the size of made clips
        "c": {"data": {"sets": (SetConfig("own", 1.0),)}},
        "d": {"data": {"fps": 8.0}},
        "e": {"data": {"manifest": "moving-digits:32:14"}},
        "f": {"loss": {"align": 0.5}},
    }
    for name, change in held_out.items():
        write(tmp_path / name, run(128, 100).altered(**change), 0.5)
    assert call(monkeypatch, "a", "f") == 0 and call(monkeypatch, "a", "f", "--value", "loss_align") == 0
    (tmp_path / "scaling.png").unlink()
    for name, text in (("damaged", "ViT"), ("later", '{"later": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for wrong, words in (
        (["a", "c"], "c has --data.sets ['own=1'] and a []: their held-out losses can't be compared"),
        (["a", "d"], "d has --data.fps 8.0 and a 4.0"),
        (["a", "e"], "e has --data.manifest moving-digits:32:14 and a moving-digits:32:22"),
        (["a", "f", "--value", "loss"], "f has --loss.align 0.5 and a 1.0"),
        (["a", "b"], "b has --eval.samples 64 and a 128: their held-out losses can't be compared"),
        (["a", "."], "scaling_laws: config.json does not exist; give a run, the --out of"),
        (["a", "--out", "law.txt"], "no picture's name"),
        (["a", "damaged"], "damaged/config.json is damaged (Expecting value: line 1"),
        (["a", "later"], "has 'later', which this version of the code doesn't know"),
        (["a", "--json", "a/config.json/law.json"], "--json a/config.json cannot be written"),
    ):
        assert call(monkeypatch, *wrong) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, "a", "--budget", "0")
    assert "no number of FLOPs" in capsys.readouterr().err and not (tmp_path / "scaling.png").exists()


RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "-m":
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    if out.name == "w64_s30":
        sys.exit("out of luck")
    (out / "config.json").write_text("{{}}")
"""


def test_the_ladder_runs_every_size_at_every_length(tmp_path):
    """With a recorder in python's place; each command's settings are read as pretrain reads them."""
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)
    ladder = {
        "PYTHON": str(tmp_path / "python"),
        "RECORD": str(tmp_path / "record"),
        "OUT": str(tmp_path / "out"),
    }
    said = subprocess.run(
        ["bash", str(TOOLS.parent / "examples/scaling/run.sh"), "--train.seed", "3"],
        env=os.environ | ladder | {"WIDTHS": "32 64", "STEPS": "10 30", "PARALLEL": "2"},
        capture_output=True,
        text=True,
    )
    assert said.returncode != 0 and "w64_s30 failed" in said.stderr and "out of luck" in said.stderr
    *runs, law = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    found = {}
    for call in runs:
        assert call[:2] == ["-m", "nextvid_mcore.pretrain"]
        config, _ = cli.parse([*call[2:], "--dry-run"])
        shape, total = config.model.encoder, sum(stage.steps for stage in config.stages)
        assert shape.mlp == 4 * shape.width and config.train.seed == 3
        assert config.eval.every == config.checkpoint.every == total and config.data.eval_manifest
        found[shape.width, total] = [stage.steps for stage in config.stages]
    assert found == {(w, s): steps for w in (32, 64) for s, steps in ((10, [2, 5, 3]), (30, [6, 15, 9]))}
    there = [f"{tmp_path}/out/{name}" for name in ("w32_s10", "w32_s30", "w64_s10")]  # what ended well
    assert law[0] == "tools/scaling_laws.py" and law[1:4] == there
