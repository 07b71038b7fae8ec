"""What benchmarks refuse, or leave out, before they measure."""

import argparse
import importlib
import sys
from pathlib import Path

import media
import pytest

from nextvid_mcore.config import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "tau=x"], "'tau=x' wants a whole number"),
        (["--case", "tau"], "'tau' is not KEY=VALUE"),
        (["--steps", "0"], "--steps 0 --warmup 3: give 1 or more"),
        (["--warmup", "-1"], "--warmup -1: give 1 or more, and 0 or more"),
    ],
)
def test_train_step(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    import train_step

    with pytest.raises(SystemExit, match="2"):
        train_step.parse(["tiny", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("attention", ["--repeats", "0"], "--repeats: 0 is too small; give 1 or more"),
        ("attention", ["--frames", "7"], "7 frames: must be a multiple of the tubelet size 2"),
        ("attention", ["--frames", "16", "64"], "--frames [16, 64] --micro-batch [16]: give as many of both"),
        (
            "knn",
            ["tiny", "--backend", "local", "--samples", "3"],
            "--samples: 3 is too small; give 6 or more",
        ),
        (
            "knn",
            ["tiny", "--backend", "local", "--micro-batch", "x"],
            "--micro-batch: invalid int value: 'x'",
        ),
        ("decode", ["/nowhere", "--seconds", "0"], "--seconds: 0 is too small; give more than 0"),
        ("fp8_convergence", ["--plot-only", "/nowhere"], "--plot-only /nowhere: no such file"),
    ],
)
def test_numbers_that_cannot_be(
    script: str,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).main()
    assert words in capsys.readouterr().err


def test_fp8_of_a_case() -> None:
    import train_step

    assert train_step.fp8_config("student:current,decoder:delayed", 1).used == {
        "student": "current",
        "decoder": "delayed",
    }
    with pytest.raises(ConfigError, match="fp8=foo:current: the roles are all, student"):
        train_step.fp8_config("foo:current", 1)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("recompute=xx", "parallel recompute 'xx' is not one of none, pieces, core_attn, full"),
        ("fp8=student:foo", "fp8 student 'foo' is not one of none, current, delayed, blockwise, mxfp8$"),
        ("graphs=maybe", "train cuda_graphs 'maybe' is not one of auto, on, off"),
        ("graphs=on", "cuda_graphs on: there is no CUDA device"),
        ("recipe=vit_x", "recipe=vit_x: there are tiny"),
        ("tensor=2", "tensor=2 can't share 1 process;"),
        ("gpus=2", "gpus=2: 1 process was started"),
        ("micro_batch=0", "micro_batch=0: give 1 or more"),
        ("accumulate=-1", "accumulate=-1: give 1 or more"),
        ("fp8=delayed", "use backend=te, not local"),
        ("backend=te", "pip install .*, or use backend=local"),
        ("vae=1", "vae=1: recipe tiny has patches of 8 pixels"),
        ("vae=2", "vae=2: recipe tiny has patches of 8 pixels"),
        ("vae=3", "vae=3: give 0"),
    ],
)
def test_a_case_that_cannot_be_is_refused_before_any_is_measured(case: str, words: str) -> None:
    import torch
    import train_step

    if torch.cuda.is_available() and case == "backend=te":
        pytest.skip("Transformer Engine may be there")

    _, cases = train_step.parse(["tiny", "--backend", "local", "--case", "", "--case", case])
    train_step.check(cases[0], 1)
    with pytest.raises(ConfigError, match=words):
        train_step.check(cases[1], 1)


@pytest.mark.parametrize("recipe", ["table2_align", "table11_tau4_30k"])
def test_a_recipe_with_fewer_steps_of_its_own(recipe: str) -> None:
    import train_step

    _, cases = train_step.parse([recipe, "--backend", "local", "--micro-batch", "1"])
    train_step.check(cases[0], 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["tiny"], "one latent of 16 x 16 pixels, but the patch size is 8"),
        (
            ["vit_l", "--train.cuda-graphs", "on", "--parallel.recompute", "full"],
            "cuda_graphs on: recompute full",
        ),
    ],
)
def test_vae(settings: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    import vae

    with pytest.raises(SystemExit, match="2"):
        vae.main(settings)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ("foo:0", "--runs foo:0: write RECIPE:SEED"),
        ("bf16", "--runs bf16: write RECIPE:SEED"),
        ("current:0", "backend te needs Transformer Engine"),
    ],
)
def test_runs_of_fp8_convergence(runs: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fp8_convergence
    import torch

    if torch.cuda.is_available() and runs == "current:0":
        pytest.skip("Transformer Engine may be there")
    monkeypatch.setattr(sys, "argv", ["fp8_convergence.py", "--runs", runs])
    with pytest.raises(ConfigError, match=words):
        fp8_convergence.check_runs(fp8_convergence.parse())


def test_rows_of_vs_vjepa2(capsys: pytest.CaptureFixture) -> None:
    import vs_vjepa2

    assert vs_vjepa2.ways("blocks,delayed") == ["blocks", "delayed"]
    with pytest.raises(SystemExit, match="2"):
        vs_vjepa2.main(["--checkout", ".", "--rows", "eager,fast", "tiny"])
    assert "'fast' is none of eager, compiled, blocks, bf16" in capsys.readouterr().err


def test_videos_that_cannot_be_read_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import decode

    media.video(tmp_path / "a.avi").rename(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"junk")
    assert [path.name for path in decode.readable(tmp_path)] == ["a.mp4"]
    assert "left out: " in capsys.readouterr().out
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(SystemExit, match="no .mp4 file to read"):
        decode.readable(tmp_path)


def test_a_video_that_cannot_be_fed_is_named(tmp_path: Path) -> None:
    import feed

    (tmp_path / "b.mp4").write_bytes(b"junk")
    args = argparse.Namespace(settings=["tiny"], folder=tmp_path, videos="*.mp4", accumulate=1)
    with pytest.raises(SystemExit, match=r"b\.mp4: .*; remove it, or leave it out with --videos"):
        feed.configure(args, tmp_path / "manifest", 1)
