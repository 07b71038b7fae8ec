"""Encoders of the probe: ours, V-JEPA 2's against frozen numbers of its own code, timm's, transformers'."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextvid_mcore import hub, recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.evaluation import encoders, foreign, vjepa2
from nextvid_mcore.evaluation.encoders import build_encoder, identity, renormalise, spread_layers
from nextvid_mcore.hub import export

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import import_vjepa2  # noqa: E402

CONFIG = export.flat_config(recipes.get("tiny"), channels=384, step=30, weights="ema")
# What V-JEPA 2's own code (facebookresearch/vjepa2, src/models/vision_transformer.py, RoPE) gives for the
# weights and the clip below: width 52, depth 3, 2 heads, patch 8, clips of 4 frames of 32 x 32.
GOLDEN = {
    (0, 0): [-0.376855, 0.418901, 1.265309, -1.038169],
    (0, 31): [-1.089211, -1.295758, 0.423609, -1.070037],
    (1, 13): [-2.931883, -0.873677, 0.557361, -0.597023],
}
GOLDEN_FIRST = [0.099427, -0.337794, 0.573583, -1.385675]  # after block 0, clip 1, token 20
GOLDEN_SUM = 2653.2251
CHANNELS = [0, 5, 17, 51]


def published() -> dict[str, Tensor]:
    """A state under V-JEPA 2's names, of chirps, which look random."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (52, 3, 2, 8, 8), "patch_embed.proj.bias": (52,),
        "norm.weight": (52,), "norm.bias": (52,),
    }  # fmt: skip
    for i in range(3):
        layer = {"norm1": (52,), "norm2": (52,), "attn.qkv": (156, 52), "attn.proj": (52, 52)}
        layer |= {"mlp.fc1": (208, 52), "mlp.fc2": (52, 208)}
        for name, shape in layer.items():
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = shape, shape[:1]
    out = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        wave = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 2 * 0.37 + i
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        out[f"module.backbone.{name}"] = (0.2 * torch.sin(wave)).reshape(shape).float() + one
    return out


def clip(*shape: int) -> Tensor:
    return torch.cos(torch.arange(torch.Size(shape).numel()).double() ** 2 * 0.11).reshape(shape).float()


# V-JEPA 2 ----------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    """A file of the published form."""
    other = {name: torch.zeros_like(value) for name, value in published().items()}
    whole = {"encoder": other, "target_encoder": published(), "predictor": {}, "epoch": 3, "lr": 1e-4}
    torch.save(whole, folder / "vitx.pt")
    return folder / "vitx.pt"


@torch.no_grad()
def test_vjepa2_computes_what_its_own_code_does(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    assert import_vjepa2.main([str(file), "--out", str(tmp_path / "dir"), "--heads", "2"]) == 0
    video = clip(2, 3, 4, 32, 32)
    for module in (vjepa2.load(tmp_path / "dir"), vjepa2.from_checkpoint(file, heads=2)):
        got = module(video)
        assert got.shape == (2, 2 * 4 * 4, 52)
        for (b, token), values in GOLDEN.items():
            assert got[b, token, CHANNELS].tolist() == pytest.approx(values, abs=1e-5)
        assert got.double().abs().sum().item() == pytest.approx(GOLDEN_SUM, abs=0.01)
        first, last = module(video, return_layers=[0, 2])
        assert first[1, 20, CHANNELS].tolist() == pytest.approx(GOLDEN_FIRST, abs=1e-5)
        assert torch.equal(last, got)


@torch.no_grad()
def test_the_quirk_is_what_the_golden_numbers_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proper rotation, both of a pair by the same angle, misses them by far more than the tolerance."""
    half = vjepa2.quirk_angles

    def proper(positions: Tensor, head_width: int, base: float) -> Tensor:
        angles = half(positions, head_width, base).unflatten(-1, (3, -1))
        return angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1).flatten(-2)

    monkeypatch.setattr(vjepa2, "quirk_angles", proper)
    got = vjepa2.from_checkpoint(checkpoint(tmp_path), heads=2)(clip(2, 3, 4, 32, 32))
    worst = max(
        abs(got[b, t, c].item() - v[i]) for (b, t), v in GOLDEN.items() for i, c in enumerate(CHANNELS)
    )
    assert worst > 1e-3


def test_vjepa2_as_an_encoder_normalises_with_imagenets_numbers(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    import_vjepa2.import_checkpoint(file, tmp_path / "dir", None, 2)
    encoder = build_encoder(str(tmp_path / "dir"))
    assert (encoder.frame_multiple, encoder.depth, encoder.image_size) == (2, 3, 256)
    pixels = torch.rand(1, 3, 4, 32, 32)
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1, 1) for x in (vjepa2.MEAN, vjepa2.STD))
    with torch.no_grad():
        expected = vjepa2.load(tmp_path / "dir")((pixels - mean) / std)
        assert torch.allclose(encoder(pixels * 2 - 1)[0], expected, atol=1e-5)
    assert all(not p.requires_grad for p in encoder.module.parameters())


def test_bad_vjepa2_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = published()
    with pytest.raises(ConfigError, match="width 52 is none of the published ones; give --heads"):
        vjepa2.convert(state)
    short = {name: value for name, value in state.items() if "blocks.1.attn.proj.bias" not in name}
    config, renamed = vjepa2.convert(short | {"module.backbone.extra": torch.zeros(1)}, 2)
    with pytest.raises(ConfigError, match="missing blocks.1.attn.proj.bias; surplus extra"):
        vjepa2.build(config, renamed, "file")
    with pytest.raises(ConfigError, match="V-JEPA 1"):
        vjepa2.convert(state | {"pos_embed": torch.zeros(1, 4, 52)}, 2)
    with pytest.raises(ConfigError, match="not a V-JEPA 2 video encoder"):
        vjepa2.convert({"a": torch.zeros(1)}, 2)
    torch.save({"model": {}, "epoch": 1}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="holds model, epoch and no target_encoder"):
        vjepa2.read_checkpoint(tmp_path / "other.pt")
    torch.save({"encoder": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert vjepa2.read_checkpoint(tmp_path / "old.pt").keys() == state.keys()  # can't be mapped, but read
    torch.save({"encoder": pytest.raises}, tmp_path / "code.pt")
    with pytest.raises(ConfigError, match="not a checkpoint of plain tensors"):
        vjepa2.read_checkpoint(tmp_path / "code.pt")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"plain tensors \(\w+\)$"):
        vjepa2.read_checkpoint(tmp_path / "torn.pt")
    with pytest.raises(ConfigError, match="width 52 by 3 heads: .*; give other --heads"):
        vjepa2.from_checkpoint(checkpoint(tmp_path), heads=3)
    assert import_vjepa2.main([str(tmp_path / "none.pt"), "--out", str(tmp_path / "x")]) == 2
    assert "there is no file" in capsys.readouterr().err


# Ours --------------------------------------------------------------------------------------------


def test_an_exported_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = hub.VisionTransformer.from_config(CONFIG)
    export.write_folder(tmp_path, CONFIG, {"encoder": module.state_dict()})
    encoder, video = build_encoder(str(tmp_path)), torch.rand(2, 3, 4, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encoder(video)[0], module.eval()(video))
        third, last, first = encoder(video, (2, -1, 0))
        expected = module(video, return_layers=[0, 2, 3])
        for got, want in zip((first, third, last), expected, strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ConfigError, match="4 layers and no layer 4"):
        encoder(video, (4,))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model.safetensors does not exist"):
        build_encoder(str(tmp_path))


def test_random_and_pixels() -> None:
    one, same, other = (build_encoder("random:tiny", seed) for seed in (0, 0, 1))
    assert identity(one) == identity(same) != identity(other)
    before = torch.random.get_rng_state()
    build_encoder("random:tiny", 3)
    assert torch.equal(before, torch.random.get_rng_state())
    video = torch.rand(2, 3, 4, 64, 64)
    assert one(video)[0].shape == (2, 2 * 64, 96)
    (token,) = build_encoder("pixels:16")(video)
    assert token.shape == (2, 1, 3 * 4 * 16 * 16)
    assert torch.equal(build_encoder("pixels:64")(video)[0].flatten(), video.flatten())
    assert identity(build_encoder("pixels:16")) != identity(build_encoder("pixels:32"))
    changed = build_encoder("random:tiny", 0)
    with torch.no_grad():
        changed.module.norm.bias[3] += 1e-6
    assert identity(changed) != identity(one)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nowhere", "no such folder or file"),
        ("random:", "random:RECIPE"),
        ("random:huge", "no recipe 'huge'"),
        ("pixels:x", "pixels:SIDE"),
        ("timm:", "name a model"),
        ("timm:vit=nofile.pt", "no file nofile.pt"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(spec)


def test_layers_are_spread_as_vjepa2s() -> None:
    assert spread_layers(24, 4) == (17, 19, 21, 23) and spread_layers(40, 4) == (24, 29, 34, 39)
    assert spread_layers(32, 4) == (19, 23, 27, 31) and spread_layers(4, 4) == (0, 1, 2, 3)
    assert spread_layers(24, 1) == (23,) and spread_layers(12, 4) == (8, 9, 10, 11)
    with pytest.raises(ConfigError, match="4 encoder layers of 3"):
        spread_layers(3, 4)


def test_normalisation() -> None:
    video = torch.full((1, 3, 1, 2, 2), 0.5)  # 0.75 of pixels in [0, 1]
    got = renormalise(video, (0.25, 0.5, 0.75), (0.5, 0.25, 1.0))
    assert got[0, :, 0, 0, 0].tolist() == [1.0, 1.0, 0.0]


# timm and transformers ---------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            build_encoder(f"{package}:something")


class LikeTimm(nn.Module):
    """The interface of timm's ViTs: one class token and the mean of each half as patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def forward_features(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 8, 8)
        halves = x.unflatten(-1, (2, 4)).mean((2, 4))  # [N, 3, 2]
        return torch.cat([x.mean((2, 3))[:, None], halves.transpose(1, 2)], dim=1)

    def forward_intermediates(self, x: Tensor, indices: list[int], **options: object) -> list:
        assert options["norm"] and options["output_fmt"] == "NLC" and options["return_prefix_tokens"]
        tokens = self.forward_features(x)
        return [(tokens[:, 1:] * (i + 1), tokens[:, :1]) for i in indices]


def test_an_image_vit_sees_frames_one_by_one() -> None:
    encoder = foreign.timm_vit(LikeTimm(), "like timm")
    assert encoder.per_frame and encoder.image_size == 8 and encoder.depth == 3
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    (tokens,) = encoder(video)
    assert tokens.shape == (2, 5 * 3, 3)
    for frame in range(5):
        (alone,) = encoder(video[:, :, frame : frame + 1])
        assert torch.allclose(alone, tokens[:, 3 * frame : 3 * frame + 3], atol=1e-6)
    flat = torch.full((1, 3, 1, 16, 16), 0.0)  # 0.5 of pixels, the mean
    assert torch.allclose(encoder(flat)[0], torch.zeros(1, 3, 3), atol=1e-6)
    last, first = encoder(video, (-1, 0))
    assert torch.allclose(last[:, 1], 3 * first[:, 1]) and torch.allclose(last[:, 0], first[:, 0])
    with pytest.raises(ConfigError, match="is not a ViT of timm"):
        foreign.timm_vit(nn.Linear(2, 2), "linear")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_real_timm_vit(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")  # as published, with its classifier
    spec = f"timm:vit_tiny_patch16_224={tmp_path}/"
    assert torch.equal(build_encoder(spec + "whole.pt").module.norm.weight, whole.norm.weight)
    state = {key: value for key, value in whole.state_dict().items() if "blocks.3.mlp" not in key}
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ConfigError, match="its weights lack 4 tensors, e.g. blocks.3.mlp.fc1.bias"):
        build_encoder(spec + "part.pt")
    with pytest.raises(ConfigError, match="have besides 1 tensors, e.g. extra"):
        torch.save(whole.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "more.pt")
        build_encoder(spec + "more.pt")

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32, depth=3)
    encoder = foreign.timm_vit(model, "timm:vit_tiny")
    video = torch.rand(2, 3, 2, 32, 32) * 2 - 1
    with torch.no_grad():
        (tokens,) = encoder(video)
        frame = renormalise(video[:, :, 1:], *(model.pretrained_cfg[x] for x in ("mean", "std")))[:, :, 0]
        assert tokens.shape == (2, 2 * 5, 192)
        assert torch.allclose(tokens[:, 5:], model.forward_features(frame), atol=1e-5)
        first, last = encoder(video, (1, 2))
        assert torch.allclose(last, tokens, atol=1e-5) and first.shape == last.shape
        assert not torch.allclose(first, last, atol=1e-2)


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
PROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@needs_transformers
@torch.no_grad()
def test_real_transformers_models(tmp_path: Path) -> None:
    import transformers as t

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    pixels = renormalise(video, PROCESSOR["image_mean"], PROCESSOR["image_std"])

    config = t.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, intermediate_size=48, **sizes)
    model = t.VideoMAEModel(config).eval()
    model.save_pretrained(tmp_path / "mae")
    (tmp_path / "mae" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    encoder = build_encoder(f"transformers:{tmp_path / 'mae'}")
    expected = model(pixel_values=pixels.transpose(1, 2), output_hidden_states=True)
    (tokens,) = encoder(video)
    assert tokens.shape == (2, 2 * 2 * 2, 24) and encoder.frame_multiple == 4
    assert torch.allclose(tokens, expected.last_hidden_state, atol=1e-5)
    second, last = encoder(video, (1, 2))
    assert torch.allclose(last, tokens, atol=1e-5)
    assert torch.allclose(second, expected.hidden_states[2], atol=1e-5)
    longer = encoder(torch.cat([video, video.flip(2)], dim=2))[0]  # in pieces of four frames
    assert longer.shape == (2, 16, 24) and torch.allclose(longer[:, :8], tokens, atol=1e-5)
    with pytest.raises(ConfigError, match="takes 4 frames at a time, not 6"):
        encoder(torch.zeros(1, 3, 6, 16, 16))
    weights = load_file(tmp_path / "mae" / "model.safetensors")
    part = {key: value for key, value in weights.items() if "layer.1." not in key}
    assert len(part) < len(weights)
    save_file(part, tmp_path / "mae" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="its weights lack .* tensors, e.g. .*1"):  # not random, not silent
        build_encoder(f"transformers:{tmp_path / 'mae'}")

    config = t.ViTConfig(image_size=16, patch_size=8, intermediate_size=48, **sizes)
    model = t.ViTModel(config, add_pooling_layer=False).eval()
    encoder = foreign.transformers_model(model, PROCESSOR, "vit")
    (tokens,) = encoder(video)
    assert tokens.shape == (2, 4 * 5, 24) and encoder.per_frame
    assert torch.allclose(tokens[:, 5:10], model(pixels[:, :, 1]).last_hidden_state, atol=1e-5)
    third, second = encoder(video, (2, 1))
    assert torch.allclose(third, tokens, atol=1e-5)
    hidden = model(pixels[:, :, 0], output_hidden_states=True).hidden_states[2]
    assert torch.allclose(second[:, :5], model.layernorm(hidden), atol=1e-5)
    with pytest.raises(ConfigError, match="states no image_mean"):
        foreign.transformers_model(model, {}, "vit")


@needs_transformers
@torch.no_grad()
def test_vjepa2_of_transformers_and_ours_agree(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Two implementations of one model; layers too."""
    import transformers as t

    config = t.VJEPA2Config(
        patch_size=8, crop_size=32, frames_per_clip=4, tubelet_size=2, hidden_size=52, num_hidden_layers=3,
        num_attention_heads=2, mlp_ratio=4, pred_hidden_size=24, pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )  # fmt: skip
    theirs = t.VJEPA2Model(config).eval()
    state = theirs.encoder.state_dict()
    mine = {
        "patch_embed.proj." + n: state[f"embeddings.patch_embeddings.proj.{n}"] for n in ("weight", "bias")
    }
    mine |= {f"norm.{n}": state[f"layernorm.{n}"] for n in ("weight", "bias")}
    for i in range(3):
        for kind in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                mine[f"blocks.{i}.{name}.{kind}"] = state[f"layer.{i}.{name}.{kind}"]
            parts = [state[f"layer.{i}.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            mine[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            mine[f"blocks.{i}.attn.proj.{kind}"] = state[f"layer.{i}.attention.proj.{kind}"]
    config_, renamed = vjepa2.convert(mine, 2)
    ours = vjepa2.encoder(vjepa2.build(config_, renamed, "x"), "ours")
    other = foreign.transformers_model(theirs, PROCESSOR, "theirs")
    video = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    assert torch.allclose(ours(video)[0], other(video)[0], atol=1e-5)
    for a, b in zip(ours(video, (0, 2)), other(video, (0, 2)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert encoders.spread_layers(other.depth, 2) == (1, 2)
    (tmp_path / "own").mkdir()
    named = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(named))
    with pytest.raises(ConfigError, match="own cannot be loaded: .*custom code"):  # and asks nobody
        build_encoder(f"transformers:{tmp_path / 'own'}")
    said = "".join(capfd.readouterr())
    assert "[y/N]" not in said
    theirs.save_pretrained(tmp_path)  # as it is published, with a processor of videos and none of pictures
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    weights = load_file(tmp_path / "model.safetensors") | {"head.of.a.task": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(build_encoder(f"transformers:{tmp_path}")(video)[0], other(video)[0])
    assert "head.of.a.task" not in "".join(capfd.readouterr())  # transformers' table of what isn't used
