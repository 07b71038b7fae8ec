"""SigLIP2 and Cosmos as targets, on small random models of the published classes, saved and loaded again."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nextvid_mcore import flops, recipes
from nextvid_mcore.config import ConfigError, RunConfig, TargetConfig
from nextvid_mcore.parallel import plan as parallel_plan
from nextvid_mcore.targets import Target, build_target, target_channels

COSMOS = {
    "encoder_block_out_channels": (8, 16, 16, 16),
    "decode_block_out_channels": (16, 16, 16, 16),
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
    "latent_channels": 4,
    "latents_mean": [0.1 * i for i in range(12)],  # [channel, latent frame]
    "latents_std": [0.5 + 0.1 * i for i in range(12)],
}


def run(kind: str, folder: object = None, patch: int = 16, **target: object) -> RunConfig:
    config = recipes.get("tiny")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, patch_size=patch),
        target=TargetConfig(kind, None if folder is None else str(folder), **target),
    )


def clip(frames: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, frames, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def cosmos(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason="the Cosmos target needs diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cosmos")
    diffusers.AutoencoderKLCosmos(**COSMOS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["siglip", "siglip-whole", "siglip2"])
def siglip(request, tmp_path_factory):
    """FixRes vision tower, FixRes with its text tower, NaFlex."""
    transformers = pytest.importorskip("transformers", reason="the SigLIP2 target needs transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if request.param == "siglip2":
        config = transformers.Siglip2VisionConfig(**sizes, patch_size=16, num_patches=16)
        network = transformers.Siglip2VisionModel(config)
    else:
        config = transformers.SiglipVisionConfig(**sizes, patch_size=16, image_size=64)
        network = transformers.SiglipVisionModel(config)
        if request.param == "siglip-whole":
            text = sizes | {"vocab_size": 64, "max_position_embeddings": 8}
            text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            both = transformers.SiglipConfig(text_config=text, vision_config=config.to_dict())
            network = transformers.SiglipModel(both)
    network.save_pretrained(folder)
    return folder


def counted(config: RunConfig, frames: int) -> tuple[float, int]:
    """The plan's FLOPs of a clip, and torch's count of the loaded network at work."""
    stage = dataclasses.replace(config.stages[0], frames=frames)
    target = build_target(config, "cpu", torch.float32)
    if hasattr(target, "network"):
        target.network.set_attn_implementation("eager")  # the CPU's fused kernel isn't counted
    with FlopCounterMode(display=False) as counter:
        target.latents(clip(frames)[:1], first=1)  # as in training
    return flops.target_flops(config, stage), counter.get_total_flops()


def test_the_plan_knows_what_the_targets_cost(cosmos, siglip):
    for config in (run("cosmos", cosmos), run("siglip2", siglip)):
        plan, real = counted(config, 4)
        assert plan == real > 1e6
    assert counted(run("siglip2", siglip), 8)[0] == 3 * plan
    assert "nan" not in parallel_plan.describe(run("siglip2", siglip), 1)


# --- Cosmos ----------------------------------------------------------------------------------------


def test_cosmos_latents_are_the_networks_own_of_the_slowed_clip(cosmos):
    from diffusers import AutoencoderKLCosmos

    config = run("cosmos", cosmos)
    target = build_target(config, "cpu", torch.float32)
    assert isinstance(target, Target)
    assert target.channels == target_channels(config) == 4 * 2 * 2
    video = clip(frames=6)
    found = target.latents(video)
    assert found.shape == (2, 3, 16, 16) and found.dtype == torch.float32
    slow = torch.stack([video[:, :, 0], *(video[:, :, i] for i in range(6) for _ in range(4))], dim=2)
    plain = AutoencoderKLCosmos.from_pretrained(cosmos).encode(slow).latent_dist.mode().detach()
    assert plain.shape == (2, 4, 4, 8, 8)
    frames = torch.tensor(COSMOS["latents_mean"]).reshape(4, 3)[:, 1:]
    spread = torch.tensor(COSMOS["latents_std"]).reshape(4, 3)[:, 1:]
    for t, y, x in ((0, 0, 0), (1, 3, 2), (2, 1, 3)):
        for dy, dx in ((0, 0), (1, 0), (1, 1)):
            place = (2 * dy + dx) * 4
            token = plain[:, :, t + 1, 2 * y + dy, 2 * x + dx]
            expected = (token - frames.mean(1)) / spread.square().mean(1).sqrt()
            assert torch.allclose(found[:, t, 4 * y + x, place : place + 4], expected, atol=1e-5)


def test_a_cosmos_token_never_depends_on_later_frames(cosmos):
    target = build_target(run("cosmos", cosmos), "cpu", torch.float32)
    video = clip(frames=6)
    changed = video.clone()
    changed[:, :, 4:] = clip(frames=2, seed=1)
    before, after = target.latents(video), target.latents(changed)
    assert torch.allclose(before[:, :2], after[:, :2], atol=1e-6)
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-3


def test_cosmos_latents_without_the_first_are_the_same(cosmos):
    target, video = build_target(run("cosmos", cosmos), "cpu", torch.float32), clip()
    assert torch.equal(target.latents(video, first=1), target.latents(video)[:, 1:])


def test_cosmos_decodes_to_the_clips_size(cosmos):
    target = build_target(run("cosmos", cosmos), "cpu", torch.float32)
    latents = target.latents(clip(frames=6))
    out = target.decode(latents)
    assert out.shape == (2, 3, 6, 64, 64) and out.isfinite().all()
    other = latents.clone()
    other[:, 2] += 1  # the decoder is causal too: frames 0 to 3 stay
    again = target.decode(other)
    assert torch.allclose(out[:, :, :4], again[:, :, :4], atol=1e-5)
    assert (out[:, :, 4:] - again[:, :, 4:]).abs().max() > 1e-4


def test_cosmos_statistics_can_be_given(cosmos, tmp_path):
    torch.save({"mean": torch.ones(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 2.0)}, tmp_path / "s.pt")
    own = build_target(run("cosmos", cosmos), "cpu", torch.float32)
    given = build_target(run("cosmos", cosmos, statistics=str(tmp_path / "s.pt")), "cpu", torch.float32)
    values = own.latents(clip()).unflatten(-1, (4, 4)) * own.std.flatten() + own.mean.flatten()
    assert torch.allclose(given.latents(clip()).unflatten(-1, (4, 4)), (values - 1) / 2, atol=1e-5)


def test_cosmos_refuses_what_it_cannot_use(cosmos, tmp_path, monkeypatch):
    for config, words in {
        run("cosmos"): "needs --target.checkpoint DIR",
        run("cosmos", tmp_path): "no config.json",
        run("cosmos", cosmos, patch=4): "--model.patch-size to a multiple of 8",
    }.items():
        with pytest.raises(ConfigError, match=words):
            target_channels(config)
    (tmp_path / "repository" / "vae").mkdir(parents=True)
    (tmp_path / "repository" / "vae" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no config.json there; there is .*repository/vae; give"):
        target_channels(run("cosmos", tmp_path / "repository"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text((cosmos / "config.json").read_text())
    with pytest.raises(ConfigError, match="no .safetensors file"):
        build_target(run("cosmos", copy), "cpu", torch.float32)
    from safetensors.torch import load_file, save_file

    weights = load_file(cosmos / "diffusion_pytorch_model.safetensors")
    weights.pop("quant_conv.weight")
    save_file(weights, copy / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing: quant_conv\.weight"):
        build_target(run("cosmos", copy), "cpu", torch.float32)
    settings = json.loads((cosmos / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"latents_mean": None}))
    with pytest.raises(ConfigError, match="no latents_mean.*--target.statistics"):
        build_target(run("cosmos", copy), "cpu", torch.float32)
    (copy / "config.json").write_text(json.dumps(settings | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match="holds AutoencoderKL"):
        target_channels(run("cosmos", copy))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="pip install diffusers"):
        build_target(run("cosmos", cosmos), "cpu", torch.float32)


# --- SigLIP2 ---------------------------------------------------------------------------------------


def test_siglip_latents_are_the_networks_own_patch_features(siglip):
    import transformers

    config = run("siglip2", siglip)
    target = build_target(config, "cpu", torch.float32)
    assert isinstance(target, Target)
    assert target.channels == target_channels(config) == 2 * 32
    video = clip()
    found = target.latents(video)
    assert found.shape == (2, 2, 16, 64) and found.dtype == torch.float32
    frame = video[:, :, 3]  # second frame of the second tubelet
    if target.kind == "siglip":
        network = transformers.SiglipVisionModel.from_pretrained(siglip)
        features = network(pixel_values=frame).last_hidden_state
    else:
        network = transformers.Siglip2VisionModel.from_pretrained(siglip)
        patches = frame.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[4, 4]] * 2)
        features = network(patches, torch.ones(2, 16, dtype=torch.int32), shapes).last_hidden_state
    assert torch.allclose(found[:, 1, :, 32:], F.layer_norm(features.detach(), (32,)), atol=1e-4)


def test_siglip_latents_without_the_first_are_the_same(siglip):
    target, video = build_target(run("siglip2", siglip), "cpu", torch.float32), clip()
    torch.testing.assert_close(target.latents(video, first=1), target.latents(video)[:, 1:])
    video[:] = video[:, :, :1]
    static = torch.tensor([True, True])
    torch.testing.assert_close(target.latents(video, static, first=1), target.latents(video)[:, 1:])


def test_siglip_frames_at_a_time_change_nothing(siglip):
    one, all_at_once = (build_target(run("siglip2", siglip, chunk=c), "cpu", torch.float32) for c in (1, 64))
    assert (one.chunk, all_at_once.chunk) == (1, 64)
    torch.testing.assert_close(one.latents(clip()), all_at_once.latents(clip()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="chunk must be 1"):
        run("siglip2", siglip, chunk=0)


def test_siglip_images_are_encoded_once_with_the_same_result(siglip):
    target = build_target(run("siglip2", siglip), "cpu", torch.float32)
    image = clip(frames=1).expand(-1, -1, 4, -1, -1)
    static = target.latents(image, static=torch.tensor([True, True]))
    assert torch.allclose(static, target.latents(image), atol=1e-5)


def test_siglip_false_colours_follow_the_features_and_nothing_else(siglip):
    first, second = (build_target(run("siglip2", siglip), "cpu", torch.float32) for _ in range(2))
    latents = first.latents(clip())
    second.decode(second.latents(clip(seed=3)))  # what was drawn before makes no difference
    colours = first.decode(latents)
    assert colours.shape == (2, 3, 4, 64, 64) and colours.abs().max() <= 1
    assert torch.equal(colours, second.decode(latents))
    assert colours.std() > 0.1
    swapped = first.decode(latents.flip(2))
    tokens = colours[..., ::16, ::16].flatten(-2)
    assert torch.allclose(swapped[..., ::16, ::16].flatten(-2), tokens.flip(-1))


def test_siglip_refuses_what_it_cannot_use(siglip, cosmos, tmp_path, monkeypatch):
    for config, words in {
        run("siglip2"): "needs --target.checkpoint DIR",
        run("siglip2", siglip, patch=8): "patches of 16 pixels",
        run("siglip2", cosmos): "model type",
    }.items():
        with pytest.raises(ConfigError, match=words):
            target_channels(config)
    (tmp_path / "config.json").write_text((siglip / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    weights = load_file(siglip / "model.safetensors")
    name = next(key for key in weights if key.endswith("post_layernorm.weight"))
    save_file(
        {key: value for key, value in weights.items() if key != name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"1 weights are missing.*post_layernorm\.weight"):
        build_target(run("siglip2", tmp_path), "cpu", torch.float32)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        build_target(run("siglip2", siglip), "cpu", torch.float32)
