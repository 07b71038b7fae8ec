"""tools/generate.py: what is generated depends on what it may depend on, and the picture is written."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import media
import pytest
import torch
from PIL import Image

from nextvid_mcore import hub, recipes
from nextvid_mcore.config import DataConfig
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.hub import export

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


def write_export(folder: Path, roles: tuple[str, ...] = ("encoder", "predictor", "decoder")) -> Path:
    """Networks full of seeded noise."""
    torch.manual_seed(0)
    states = {}
    for role in roles:
        network = hub.MODULES[role].from_config(CONFIG)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        states[role] = network.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    export.write_folder(folder, CONFIG, states)
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


def test_the_picture(run: Path) -> None:
    ended = start(str(run), "--steps", "1", "--mask", "2")
    assert ended.returncode == 0, ended.stderr
    picture = run / "plots" / "generated.png"
    assert str(picture) in ended.stdout
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors(256) or []) > 20


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path) -> None:
    module = tool()
    with pytest.raises(module.ConfigError, match="config.json does not exist; give a run"):
        module.read_run(tmp_path)
    encoder_alone = write_export(tmp_path / "encoder", roles=("encoder",))
    with pytest.raises(hub.HubError, match="convert with --all"):
        module.Networks.load(encoder_alone)
    ended = start(str(run), "--mask", "3")
    assert ended.returncode == 2 and ended.stderr == "generate: --mask 3: the run has masks 1 to 2\n"
