"""Exported folders: strict loading, and nothing but torch and safetensors behind it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nextvid_mcore
from nextvid_mcore import hub, recipes
from nextvid_mcore.hub import export

CONFIG = export.flat_config(recipes.get("tiny"), channels=384, step=30, weights="ema")


def randomised(role: str) -> torch.nn.Module:
    torch.manual_seed(1)
    module = hub.MODULES[role].from_config(CONFIG)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    states = {role: randomised(role).state_dict() for role in hub.FILES}
    export.write_folder(tmp_path, CONFIG, states)
    return tmp_path


def rewrite(folder: Path, change: dict, drop: tuple[str, ...] = ()) -> None:
    config = {k: v for k, v in (CONFIG | change).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip(folder: Path) -> None:
    for role, load in (
        ("encoder", hub.load_encoder),
        ("predictor", hub.load_predictor),
        ("decoder", hub.load_decoder),
    ):
        module, expected = load(folder), randomised(role).state_dict()
        assert not module.training and module.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
        assert all(p.requires_grad for p in module.parameters())
    assert next(hub.load_encoder(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_config_of_the_recipes() -> None:
    assert (CONFIG["frames"], CONFIG["target_kind"], CONFIG["target_channels"]) == (8, "pixels", 384)
    assert export.flat_config(recipes.get("tiny"), 384, 101, "ema")["frames"] == 16
    assert export.flat_config(recipes.get("tiny"), 384, 100, "ema")["frames"] == 8
    assert export.flat_config(recipes.get("tiny"), 384, 10_000, "ema")["frames"] == 16
    giant = export.flat_config(recipes.get("vit_g"), 64, 132_000, "online")
    with torch.device("meta"):
        counts = [sum(p.numel() for p in m.from_config(giant).parameters()) for m in hub.MODULES.values()]
    assert [round(count / 1e6, 1) for count in counts] == [1012.2, 22.4, 32.7]


@pytest.mark.parametrize(
    "change, drop, message",
    [
        ({"format_version": 2}, (), "format version 2; this code reads version 1"),
        ({}, ("format_version",), "format version None"),
        ({"windows": 3}, (), "unknown windows"),
        ({}, ("depth", "heads"), "missing depth, heads"),
        ({"depth": 4.0}, (), r"depth is 4.0; it must be a whole number from 1"),
        ({"step": -1}, (), "step is -1"),
        ({"norm_eps": True}, (), "norm_eps is True"),
        ({"recipe": 3}, (), "recipe is 3; it must be text"),
        ({"target_pixel_scale": 0.0}, (), "target_pixel_scale is 0.0; it must be a positive number"),
    ],
)
def test_bad_configs(folder: Path, change: dict, drop: tuple[str, ...], message: str) -> None:
    rewrite(folder, change, drop)
    with pytest.raises(hub.HubError, match=message):
        hub.load_encoder(folder)


def test_a_run_or_a_transformers_folder_is_told_so(tmp_path: Path) -> None:
    for content, message in (
        ({"stages": []}, "is of a training run"),
        ({"model_type": "vit"}, "transformers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(hub.HubError, match=message):
            hub.load_encoder(tmp_path)


def test_a_retired_setting_at_its_last_value_is_passed_over() -> None:
    config = recipes.get("tiny")
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    parts = {type(part).__name__: name for name, part in vars(config).items()}
    for part, settings in export.RETIRED.items():
        for name, values in settings.items():
            for plain[parts[part]][name] in values:
                assert export.run_config(plain) == config
    plain["fp8"]["wgrad"] = False
    with pytest.raises(hub.HubError, match="fp8 has 'wgrad'"):
        export.run_config(plain)


def test_folders_from_before_a_key(folder: Path) -> None:
    rewrite(folder, {}, tuple(hub.LATER))
    assert hub.load_config(folder) == CONFIG  # tiny's own are the defaults
    hub.load_encoder(folder)


def test_bad_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    bad = {name: value for name, value in state.items() if name != "blocks.1.attn.qkv.bias"}
    save_file(bad | {"blocks.9.norm1.weight": torch.ones(96), "norm.bias": torch.ones(95)}, path)
    with pytest.raises(hub.HubError) as error:
        hub.load_encoder(folder)
    assert "missing blocks.1.attn.qkv.bias" in str(error.value)
    assert "surplus blocks.9.norm1.weight" in str(error.value)
    assert "norm.bias [95] instead of [96]" in str(error.value)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(hub.HubError, match="model.safetensors cannot be read"):
        hub.load_encoder(folder)


def test_missing_files(folder: Path) -> None:
    (folder / "decoder.safetensors").unlink()
    with pytest.raises(hub.HubError, match="convert with --all"):
        hub.load_decoder(folder)
    with pytest.raises(hub.HubError, match="config.json does not exist"):
        hub.load_encoder(folder / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(hub.HubError, match="not JSON"):
        hub.load_encoder(folder)


def test_a_fresh_process_needs_torch_and_safetensors_alone(folder: Path) -> None:
    """An import of anything that the base install lacks fails there."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"megatron", "transformer_engine", "einops", "decord", "tyro", "numpy"}:
            raise ModuleNotFoundError(f"{name} is not in the base install")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch, nextvid_mcore.hub as hub
encoder = hub.load_encoder(sys.argv[2])
assert encoder(torch.zeros(1, 3, 4, 64, 64)).shape == (1, 128, 96)
hub.load_predictor(sys.argv[2]), hub.load_decoder(sys.argv[2])
bad = {"megatron", "einops", "transformer_engine"} & {name.split(".")[0] for name in sys.modules}
assert not bad and "nextvid_mcore.config" not in sys.modules, bad
"""
    root = str(Path(nextvid_mcore.__file__).parents[1])
    subprocess.run([sys.executable, "-I", "-c", program, root, str(folder)], check=True, timeout=120)
