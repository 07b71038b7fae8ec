"""tools/generate.py: what is generated depends on what it may depend on, and the pictures are written."""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import media
import pytest
import torch
from PIL import Image

from nextvid_mcore import flow, hub, recipes
from nextvid_mcore.config import ConfigError, DataConfig
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.evaluation.generation import draw_noise, roll_out
from nextvid_mcore.hub import export
from nextvid_mcore.targets import build_target

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "generate.py"
CONFIG = export.flat_config(recipes.get("tiny"), channels=384, step=1, weights="ema")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


def write_export(
    folder: Path, roles: tuple[str, ...] = ("encoder", "predictor", "decoder"), config: dict = CONFIG
) -> Path:
    """Networks full of seeded noise."""
    torch.manual_seed(0)
    states = {}
    for role in roles:
        network = hub.MODULES[role].from_config(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        states[role] = network.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    export.write_folder(folder, config, states)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an export, on a manifest of one video and one image."""
    root = tmp_path_factory.mktemp("generate")
    items = {"clips": [Item(str(media.video(root / "a.avi")), "video")]}
    items["pictures"] = [Item(str(media.image(root / "b.png")), "image")]
    media.manifest(root / "val", **items)
    data = DataConfig(eval_manifest=str(root / "val"), fps=25)
    config = dataclasses.replace(recipes.get("tiny"), data=data)
    (root / "run").mkdir()
    (root / "run" / "config.json").write_text(config.to_json())
    write_export(root / "run" / "encoder")
    return root / "run"


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_a_frame_depends_on_earlier_frames_and_its_own_noise_alone(run: Path) -> None:
    networks = tool().Networks.load(run / "encoder")
    torch.manual_seed(1)
    video, noise = torch.rand(1, 3, 8, 64, 64) * 2 - 1, torch.randn(1, 3, 64, 384)
    tokens = torch.arange(3 * 64)[None, ::2]
    first = networks.generate(video, tokens, noise, steps=2)
    assert first.shape == noise.shape and (first - noise).abs().max() > 0.1

    changed = video.clone()
    changed[:, :, 4:] = 0  # token frames 2 and 3
    second = networks.generate(changed, tokens, noise, steps=2)
    assert torch.allclose(second[:, :2], first[:, :2], atol=1e-5)  # frames 1 and 2
    assert (second[:, 2] - first[:, 2]).abs().max() > 1e-3

    other = noise.clone()
    other[:, 0] += 1
    third = networks.generate(video, tokens, other, steps=2)
    assert torch.allclose(third[:, 1:], first[:, 1:], atol=1e-5)
    assert (third[:, 0] - first[:, 0]).abs().max() > 0.1


def test_solvers_agree_with_many_steps_and_differ_with_one(run: Path) -> None:
    networks = tool().Networks.load(run / "encoder")
    video, noise = torch.zeros(1, 3, 4, 64, 64), draw_noise(0, 0, 0, (1, 64, 384))
    tokens = torch.arange(64)[None]

    def distance(steps: int) -> float:
        by = [
            networks.generate(video, tokens, noise, steps, solver) for solver in (flow.euler, flow.midpoint)
        ]
        return (by[0] - by[1]).abs().max().item()

    assert distance(1) > 1e-3 and distance(16) < distance(1) / 4


def test_a_roll_out_feeds_back_what_it_generated(run: Path) -> None:
    """Each new token frame is the target's picture of what the networks say after all frames so far."""
    networks = tool().Networks.load(run / "encoder")
    target = build_target(recipes.get("tiny"), "cpu", torch.float32)
    start = (torch.rand(1, 3, 1, 64, 64) * 2 - 1).expand(-1, -1, 2, -1, -1)
    noise = draw_noise(3, 0, 0, (3, 64, 384))
    video = roll_out(networks, target, start, 3, noise, steps=2)
    assert video.shape == (1, 3, 8, 64, 64) and torch.equal(video[:, :, :2], start)
    assert video.abs().max() <= 1
    longer = torch.cat([video, video[:, :, :2]], dim=2)  # frames to come make no difference
    for frame in (1, 2, 3):
        tokens = torch.arange(frame * 64)[None]
        z, _ = networks.predictor(
            networks.encoder(longer, torch.arange(256)[None])[:, : frame * 64], tokens, frames=[frame]
        )
        latents = flow.midpoint(
            lambda x, tau, z=z: networks.decoder(x.flatten(1, 2), torch.full((1, 1), tau), z).view_as(x),
            noise[:, frame - 1 : frame],
            2,
        )
        expected = target.decode(latents).clamp(-1, 1)
        assert torch.allclose(video[:, :, 2 * frame : 2 * frame + 2], expected, atol=1e-4)
    kept = roll_out(networks, target, start, 3, noise, steps=2, keep=1)
    assert torch.equal(kept[:, :, :4], video[:, :, :4])
    assert (kept[:, :, 4:] - video[:, :, 4:]).abs().max() > 1e-3


def test_a_target_without_pixels_cannot_be_rolled_out(run: Path) -> None:
    networks = tool().Networks.load(run / "encoder")
    blind = type("Blind", (), {"false_colour": True, "channels": 384})()
    with pytest.raises(ConfigError, match="--mode masked"):
        roll_out(networks, blind, torch.zeros(1, 3, 2, 64, 64), 1, torch.zeros(1, 1, 64, 384), steps=1)


def gif(path: Path) -> tuple[int, int, int]:
    """Frames, width and height."""
    with Image.open(path) as image:
        return image.n_frames, *image.size


def test_an_export_alone_with_files_of_ones_own(run: Path, tmp_path: Path) -> None:
    """Without a run: an image is a seed, a video brings what really came; an MP4 is there if PyAV is."""
    seed, clip = media.image(tmp_path / "data" / "seed.png"), media.video(tmp_path / "data" / "clip.avi")
    common = ("--data", str(tmp_path / "data"), "--steps", "1", "--out", str(tmp_path / "out"), "--fps", "25")
    ended = start(
        str(run / "encoder"), "--mode", "autoregressive", "--length", "2", "--solver", "euler", *common
    )
    assert ended.returncode == 0, ended.stderr
    assert "of --clips" not in ended.stdout
    frames, width, height = gif(tmp_path / "out" / "rollout.gif")
    assert frames == 6 and width > 3 * 128 and height > 2 * 128  # original and two samples; two clips
    assert (tmp_path / "out" / "rollout.png").exists() and seed.exists() and clip.exists()
    has_av = importlib.util.find_spec("av") is not None
    ended = start(
        str(run / "encoder"), "--samples", "1", "--clips", "3", "--skip", "1", "--frames", "4", *common
    )
    assert ended.returncode == 0 and "has 1 clips from --skip 1 on, not the 3 of --clips" in ended.stdout
    ended = start(str(run / "encoder"), "--samples", "1", "--clips", "1", "--frames", "4", "--mp4", *common)
    if has_av:
        assert ended.returncode == 0, ended.stderr
        from nextvid_mcore.data.decode import Video

        film = Video(str(tmp_path / "out" / "generated.mp4"))
        assert film.frames == 4 and film.fps == pytest.approx(25)
    else:
        assert ended.returncode == 2 and "pip install av" in ended.stderr


def test_an_export_of_a_grid_that_table_8s_shares_do_not_divide(run: Path, tmp_path: Path) -> None:
    """6 x 6 tokens: 0.375 of them are 13.5. A run of this grid names its own shares, an export has none."""
    folder = write_export(tmp_path / "grid6", config=CONFIG | {"image_size": 48})
    media.image(tmp_path / "seed.png")
    common = ("--data", str(tmp_path / "seed.png"), "--steps", "1", "--out", str(tmp_path / "out"))
    for mode in ("autoregressive", "masked"):
        ended = start(str(folder), "--mode", mode, "--samples", "1", "--length", "1", *common)
        assert ended.returncode == 0, ended.stderr


def test_held_out_clips_are_not_drawn_twice(run: Path) -> None:
    module = tool()
    args = argparse.Namespace(data=None, clips=5, skip=1)
    config = module.read_run(run)
    assert [clip.name for clip in module.read_clips(config, args, 8)] == ["b.png"]  # of two
    args.skip = 2
    with pytest.raises(ConfigError, match="val has no more than 2 clips; lower --skip"):
        module.read_clips(config, args, 8)


def test_the_picture(run: Path) -> None:
    ended = start(str(run), "--steps", "1", "--mask", "2")
    assert ended.returncode == 0, ended.stderr
    picture = run / "plots" / "generated.png"
    assert str(picture) in ended.stdout
    assert gif(picture.with_suffix(".gif"))[0] == 8
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors(256) or []) > 20


def test_mistakes_are_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = tool()
    with pytest.raises(module.ConfigError, match="config.json does not exist; give a run"):
        module.read_run(tmp_path)
    ablation = tmp_path / "ablation"
    ablation.mkdir()
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["generate"] = False
    (ablation / "config.json").write_text(json.dumps(settings))
    ended = start(str(ablation))
    assert ended.returncode == 2 and ended.stderr == (
        f"generate: {ablation} was trained without a decoder; there is nothing to generate\n"
    )
    settings["model"] |= {"generate": True, "align": False}
    (ablation / "config.json").write_text(json.dumps(settings))
    ended = start(str(ablation))
    assert ended.returncode == 2 and "this run has model.align False: its encoder alone" in ended.stderr
    encoder_alone = write_export(tmp_path / "encoder", roles=("encoder",))
    with pytest.raises(hub.HubError, match="convert with --all"):
        module.Networks.load(encoder_alone)
    ended = start(str(run), "--mask", "3")
    assert ended.returncode == 2 and ended.stderr == "generate: --mask 3: the run has masks 1 to 2\n"
    (tmp_path / "file").touch()
    for options, message in (
        (("--columns", "0"), "--columns must be 1 or more"),
        (("--fps", "0"), "--fps must be positive, got 0"),
        (("--frames", "-4"), "--frames must be 1 or more, got -4"),
        (("--out", str(tmp_path / "file")), "file cannot be written"),
        (
            ("--export", str(write_export(tmp_path / "other", config=CONFIG | {"target_pixel_scale": 8.0}))),
            f"other is of another run than {run}: target_pixel_scale 8.0 and not 1.0; export this one",
        ),
        (
            ("--export", str(tmp_path / "none")),
            f"export the run first: python tools/convert_to_torch.py {run}",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["generate", str(run), *options])
        assert module.main() == 2 and message in capsys.readouterr().err
    path = tmp_path / "latents" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG | {"target_kind": "va_vae", "target_channels": 64}))
    for folder, options, message in (
        (
            path.parent,
            (),
            "latents of va_vae: give what it was trained with, --target-checkpoint and --target-s",
        ),
        (
            run / "encoder",
            ("--target-checkpoint", "x.pt"),
            "--target-checkpoint: this model makes pixels",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["generate", str(folder), *options, "--data", str(tmp_path)])
        assert module.main() == 2 and message in capsys.readouterr().err
