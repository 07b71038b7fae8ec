"""convert_to_torch --format hf: the folder's files, and what transformers makes of them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nextvid_mcore import recipes
from nextvid_mcore.data.transforms import centre_crop, normalize, resize_clip
from nextvid_mcore.hub import VisionTransformer, export
from nextvid_mcore.hub.hf import write
from nextvid_mcore.hub.vit import frame_plan, grid_positions, rope_angles

ROOT = Path(__file__).resolve().parents[2]
RUN = recipes.get("tiny")
CONFIG = export.flat_config(RUN, channels=384, step=60, weights="ema")
METRICS = {"step": 60, "samples": 440, "loss": 1.25, "loss_flow": 1.5, "loss_align": None}

USE = """
import sys
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel

folder, inputs, copy = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
given = torch.load(inputs)
assert not model.training and AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 96
batch = processor(videos=given["clip"])
with torch.no_grad():
    out = model(**batch, output_hidden_states=True)
    video = batch["pixel_values_videos"].transpose(1, 2)
    layers = model.get_intermediate_layers(video, n=2)
    assert torch.equal(model.forward_features(video), out.last_hidden_state)
    assert torch.equal(model(**batch, return_dict=False)[0], out.last_hidden_state)
assert torch.equal(layers[-1], out.last_hidden_state)
picture = processor(images=given["clip"][0])["pixel_values_videos"]
model.save_pretrained(copy)
processor.save_pretrained(copy)
again = AutoModel.from_pretrained(copy, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**batch).last_hidden_state, out.last_hidden_state)
found = {"pixels": video, "tokens": out.last_hidden_state, "hidden": out.hidden_states, "picture": picture}
torch.save(found, inputs)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, VisionTransformer]:
    torch.manual_seed(0)
    encoder = VisionTransformer.from_config(CONFIG).eval()
    folder = tmp_path_factory.mktemp("hf")
    write.write_folder(folder, RUN, CONFIG, encoder.state_dict(), METRICS, {"loss": 1.125})
    return folder, encoder


def test_the_folder_is_whole_and_needs_nothing_of_this_package(exported):
    folder, _ = exported
    assert {path.name for path in folder.iterdir()} == set(write.FILES)
    assert (folder / "vit.py").read_bytes() == (ROOT / "nextvid_mcore" / "hub" / "vit.py").read_bytes()
    allowed = {"__future__", "collections", "typing", "torch", "numpy", "transformers"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in write.FILES
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, (path, node.module)
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
    settings = json.loads((folder / "config.json").read_text())
    assert settings["hidden_size"] == 96 and settings["nextvid"]["step"] == 60


def test_the_card_is_filled_from_the_run(exported):
    card = (exported[0] / "README.md").read_text()
    for words in (
        "recipe `tiny`",
        f"EMA weights after step 60 of {sum(stage.steps for stage in RUN.stages)}",
        "| width, layers, heads, MLP | 96, 4, 4, 384 |",
        f"warmup: {RUN.stages[0].steps} steps of {RUN.stages[0].batch} clips",
        "| clips seen | 440 |",
        "| training clips, last step | loss 1.2500, loss_flow 1.5000 |",
        "| held-out clips, EMA | loss 1.1250 |",
    ):
        assert words in card, words
    assert "{" not in card and card.startswith("---\n") and max(map(len, card.splitlines())) < 400


def in_transformers(program: str, folder: Path, clip: np.ndarray, tmp_path: Path) -> dict:
    """What a user's program, in a process that knows nothing of this package, makes of the clip."""
    torch.save({"clip": torch.from_numpy(clip)}, tmp_path / "io.pt")
    (tmp_path / "use.py").write_text(program)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "use.py", str(folder), "io.pt", str(tmp_path / "copy")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "io.pt")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers isn't installed")
def test_transformers_loads_it_and_computes_the_same(exported, tmp_path):
    folder, encoder = exported
    clip = np.random.default_rng(0).integers(0, 256, (4, 80, 100, 3), dtype=np.uint8)
    found = in_transformers(USE, folder, clip, tmp_path)
    video = normalize(resize_clip(clip, centre_crop(80, 100), 64, False))[None]
    assert torch.allclose(found["pixels"], video, atol=1e-6)  # as in evaluation
    with torch.no_grad():
        tokens = encoder(video)
        hidden = encoder(video, return_layers=range(4), norm_layers=False)
    assert torch.allclose(found["tokens"], tokens, atol=1e-5)
    assert len(found["hidden"]) == 1 + 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found["hidden"][1:], hidden, strict=True))
    with torch.no_grad():
        angles = rope_angles(grid_positions(*encoder.grid(video.shape)), 24, encoder.rope_base)[None, None]
        plan = frame_plan(*[torch.arange(2)[None].repeat_interleave(64, 1)] * 2)
        first = encoder.blocks[0](found["hidden"][0], angles, plan)  # what it reads is the embedding
    assert torch.allclose(first, hidden[0], atol=1e-5)
    still = found["picture"]
    assert still.shape == (1, CONFIG["frames"], 3, 64, 64)
    assert torch.allclose(still[0, -1], video[0, :, 0], atol=1e-6)


VIDEO = """
import re
import sys
import warnings
import torch
from transformers import AutoImageProcessor, AutoModel, AutoVideoProcessor

folder, inputs, copy = sys.argv[1:]
clip = torch.load(inputs)["clip"]
processor = AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "NextVidVideoProcessor"
processor.save_pretrained(copy)
again = AutoVideoProcessor.from_pretrained(copy, trust_remote_code=True)
pictures = AutoImageProcessor.from_pretrained(copy, trust_remote_code=True)
assert type(again).__name__ == type(processor).__name__ and type(pictures).__name__ == "NextVidProcessor"
assert len(pictures([clip[0], clip[1]])["pixel_values_videos"]) == 2  # not one clip of two frames
still = clip.numpy()
still.setflags(write=False)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    processor(still)
for given, options, said in (
    (clip.float() / 255, {}, "of floats in .0, 1.: .x . 255..round.. as uint8"),
    (clip, {"num_frames": 16}, "num_frames 16 is of a picture's clip"),
    (clip[:3], {}, r"clips have \\[3\\] frames: give equal numbers, multiples of 2"),
    ("clip.mp4", {}, "got 'clip.mp4': give decoded pictures"),
    ([], {}, r"got \\[\\]: give decoded"),
):
    try:
        processor(given, **options)
    except ValueError as error:
        assert re.search(said, str(error)), error
    else:
        raise AssertionError(said)
batches = [processor(clip), processor(videos=[clip]), again(list(clip)), processor(clip[None])]
pixels = [batch["pixel_values_videos"] for batch in batches]
assert all(torch.equal(each, pixels[0]) for each in pixels)
assert processor([clip, clip.flip(0)])["pixel_values_videos"].shape == (2, *pixels[0].shape[1:])
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
try:
    model(pixels[0].transpose(1, 2))  # as the encoder itself takes it
except ValueError as error:
    assert "has shape (1, 3, 4, 64, 64): give [B, T, 3, H, W], as the" in str(error), error
else:
    raise AssertionError("frames taken for channels")
with torch.no_grad():
    torch.save({"pixels": pixels[0], "tokens": model(**batches[0]).last_hidden_state}, inputs)
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "torchvision")),
    reason="transformers or torchvision, which its AutoVideoProcessor needs, isn't installed",
)
def test_the_video_processor_takes_clips(exported, tmp_path):
    folder, encoder = exported
    clip = np.random.default_rng(0).integers(0, 256, (4, 80, 100, 3), dtype=np.uint8)
    found = in_transformers(VIDEO, folder, clip, tmp_path)
    video = normalize(resize_clip(clip, centre_crop(80, 100), 64, False))[None]
    assert torch.allclose(found["pixels"], video.transpose(1, 2), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(found["tokens"], encoder(video), atol=1e-5)


def test_features_the_way_of_timm(exported):
    _, encoder = exported
    video = torch.rand(1, 3, 4, 64, 32) * 2 - 1
    with torch.no_grad():
        tokens = encoder(video)
        assert torch.equal(encoder.forward_features(video), tokens)
        two = encoder.get_intermediate_layers(video, n=2)
        assert len(two) == 2 and torch.equal(two[1], tokens)
        assert torch.equal(two[0], encoder(video, return_layers=[2])[0])
        (raw,) = encoder.get_intermediate_layers(video, n=[3], norm=False)
        assert torch.allclose(encoder.norm(raw), tokens, atol=1e-6)
        (maps,) = encoder.get_intermediate_layers(video, reshape=True)
    assert maps.shape == (1, 96, 2, 8, 4) and torch.equal(maps[0, :, 1, 2, 3], tokens[0, 32 + 2 * 4 + 3])
    with pytest.raises(ValueError, match="has 4"):
        encoder.get_intermediate_layers(video, n=5)
