"""tools/train_vae.py learns, is deterministic, resumes exactly, and writes files that load strictly."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import media
import numpy as np
import pytest
import torch
from PIL import Image
from tool import tool

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, TargetConfig
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.targets import build_target


def pictures() -> np.ndarray:
    """Six pictures of coarse colour patches (norms over a picture hide flat ones): uint8 [6, 16, 16, 3]."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


@pytest.fixture(scope="module")
def vae():
    return tool("train_vae")


@pytest.fixture(scope="module")
def settings(vae, tmp_path_factory):
    root = tmp_path_factory.mktemp("vae")
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(root / f"{i}.png")
    items = [Item(str(root / f"{i}.png"), "image") for i in range(6)]
    manifest = media.manifest(root / "manifest", pictures=items)
    return vae.Settings(
        str(manifest), size=16, multipliers=(1, 2), latent=3, steps=6, batch=2, frames=1, lr=3e-3
    )


def train(vae, settings, out: Path, stop: int | None = None):
    training = vae.Training(settings, out, "cpu")
    training.run(workers=0, save_every=100, progress=False, stop=stop)
    return training


def test_a_stopped_training_goes_on_exactly(vae, settings, tmp_path):
    whole = train(vae, settings, tmp_path / "whole")
    assert train(vae, settings, tmp_path / "parts", stop=2).step == 2
    parts = train(vae, settings, tmp_path / "parts")
    assert whole.step == parts.step == 6 and whole.rows == parts.rows
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    told = vae.Training(settings, tmp_path / "told", "cpu")
    assert not told.run(workers=0, save_every=100, progress=False, told=lambda: told.step == 3)
    assert train(vae, settings, tmp_path / "told").rows == whole.rows
    assert torch.load(tmp_path / "told" / "training.pt", weights_only=True)["step"] == 6
    other = train(vae, dataclasses.replace(settings, seed=1), tmp_path / "other", stop=1)
    assert other.rows[0]["loss"] != whole.rows[0]["loss"]
    with pytest.raises(ConfigError, match=r"other settings: seed 0 \(now 1\)"):
        vae.Training(dataclasses.replace(settings, seed=1), tmp_path / "whole", "cpu")


def test_the_result_is_a_target(vae, settings, tmp_path, monkeypatch, capsys):
    """By the command line: the loss falls, and the files load strictly with the shape they bring along."""
    flags = ["--manifest", settings.manifest, "--out", str(tmp_path / "out"), "--size", "16"]
    flags += ["--multipliers", "1,2", "--latent", "3", "--batch", "4", "--frames", "1", "--steps", "60"]
    flags += ["--workers", "0", "--samples", "8", "--lr", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["train_vae", *flags])
    assert vae.main() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "PSNR" in said and "--model.patch-size 2" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and rows[-1]["l1"] < 0.7 * rows[0]["l1"]
    assert (tmp_path / "out" / "reconstructions.png").exists()

    statistics = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    assert {k: tuple(v.shape) for k, v in statistics.items()} == {"mean": (1, 3, 1, 1), "std": (1, 3, 1, 1)}
    config = recipes.get("tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, image_size=16, patch_size=2),
        target=TargetConfig(
            "va_vae", *(str(tmp_path / "out" / n) for n in ("autoencoder.pt", "latents_stats.pt"))
        ),
    )
    target = build_target(config, "cpu", torch.float32)
    assert target.channels == 6
    video = torch.from_numpy(pictures()).permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 2, -1, -1) / 127.5 - 1
    latents = target.latents(video)
    assert 0.3 < latents.std() < 3 and latents.mean().abs() < 1  # normalised by what was measured
    pair = torch.stack([target.decode(latents).flatten(), video.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.3  # untrained: about 0


def test_wrong_settings_are_named(vae, settings, tmp_path, monkeypatch, capsys):
    for changes, words in (
        ({"size": 15}, "not divisible by 2"),
        ({"width": 20}, "multiple of 32"),
        ({"steps": 0}, "--steps must be positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            vae.Training(dataclasses.replace(settings, **changes), tmp_path, "cpu")
    flags = ["--manifest", str(tmp_path / "none"), "--out", str(tmp_path / "x"), "--size", "16"]
    monkeypatch.setattr(sys, "argv", ["train_vae", *flags, "--multipliers", "1,2", "--workers", "0"])
    assert vae.main() == 2 and "no manifest at" in capsys.readouterr().err
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "training.pt").write_bytes(b"torn")
    small = ["--manifest", settings.manifest, "--size", "16", "--multipliers", "1,2", "--workers", "0"]
    for options, words in (
        (["--device", "banana"], "--device banana: write cpu"),
        (["--workers", "-1"], "--workers must be 0 or more, got -1"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--out", str(tmp_path / "half")], "training.pt cannot be read"),
        (["--out", str(tmp_path / "half" / "training.pt")], "cannot be written (File exists)"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_vae", *small, "--out", str(tmp_path / "y"), *options])
        assert vae.main() == 2 and words in capsys.readouterr().err
