"""VA-VAE's file: keys and shapes, strict loading. The full-size network: name, shape and count."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import save_file
from unit.narrow_vae import NARROW, clip, make_narrow

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, TargetConfig
from nextvid_mcore.targets import Target, build_target, target_channels
from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape
from nextvid_mcore.targets.va_vae import fuses, load_autoencoder, load_statistics, shape_of


@pytest.fixture(scope="module")
def narrow() -> AutoencoderKL:
    return make_narrow()


@pytest.fixture(scope="module")
def full_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in AutoencoderKL().state_dict().items()}


def test_full_size_is_69_8m_parameters(full_shapes):
    assert sum(torch.Size(s).numel() for s in full_shapes.values()) == 69_836_067


def test_keys_and_shapes_are_the_published_ones(full_shapes):
    """The digest is of the names and shapes of LightningDiT's own module, listed as `key (shape)`."""
    for key, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.4.attn.1.proj_out.bias": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (64, 512, 3, 3),
        "decoder.conv_in.weight": (512, 32, 3, 3),
        "decoder.up.4.attn.2.norm.weight": (512,),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "quant_conv.weight": (64, 64, 1, 1),
        "post_quant_conv.weight": (32, 32, 1, 1),
    }.items():
        assert full_shapes[key] == shape, key
    for key in ("encoder.down.4.downsample.conv.weight", "decoder.up.0.upsample.conv.weight"):
        assert key not in full_shapes
    assert len(full_shapes) == 342
    listing = "\n".join(f"{k} {full_shapes[k]}" for k in sorted(full_shapes))
    assert (
        hashlib.sha256(listing.encode()).hexdigest()
        == "5be5c896fe9232de1e9064ebf01c211d9c3c5df72c0de67f54d75ceff9076af5"
    )


def full_file(path, shapes, **changes) -> str:
    """A checkpoint of the exact keys and shapes; one stored number per tensor keeps it small."""
    tensors = {k: torch.tensor(0.001 * i).expand(s) for i, (k, s) in enumerate(sorted(shapes.items()))}
    tensors |= {"loss.logvar": torch.zeros(()), "foundation_model.norm.weight": torch.ones(2)}
    torch.save({"epoch": 3, "state_dict": tensors | changes}, path)
    return str(path)


def test_full_size_file_loads_and_training_leftovers_are_dropped(tmp_path, full_shapes):
    loaded = load_autoencoder(full_file(tmp_path / "vae.pt", full_shapes))
    for i, (key, shape) in enumerate(sorted(full_shapes.items())):
        value = loaded.state_dict()[key]
        assert tuple(value.shape) == shape and value.flatten()[0] == torch.tensor(0.001 * i), key


def test_build_target_reads_the_two_files(tmp_path, full_shapes):
    stats = tmp_path / "latents_stats.pt"
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.full((1, 32, 1, 1), 2.0)}, stats)
    config = recipes.get("vit_l")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, image_size=64),
        mask=dataclasses.replace(config.mask, keep=(0.5, 0.25)),
        target=dataclasses.replace(
            config.target,
            checkpoint=full_file(tmp_path / "vae.pt", full_shapes),
            statistics=str(stats),
            chunk=7,
        ),
    )
    built = build_target(config, "cpu", torch.bfloat16)
    assert built.chunk == 7
    assert isinstance(built, Target) and built.channels == 64
    assert not any(p.requires_grad for p in built.autoencoder.parameters())
    assert {p.dtype for p in built.autoencoder.parameters()} == {torch.bfloat16}
    assert built.autoencoder.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(built.std, torch.full((1, 32, 1, 1), 2.0))


def test_only_half_precision_on_cuda_is_fused():
    """A run in fp32 would get latents as exact as bf16's."""
    assert fuses("cuda", torch.bfloat16) and fuses(torch.device("cuda", 1), torch.float16)
    assert not fuses("cuda", torch.float32) and not fuses("cpu", torch.bfloat16)


@pytest.mark.parametrize("kind", ["wrapped", "bare", "legacy", "safetensors"])
def test_every_file_form_gives_the_same_weights(tmp_path, narrow, kind):
    tensors = narrow.state_dict()
    path = tmp_path / ("vae.safetensors" if kind == "safetensors" else "vae.pt")
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    else:
        torch.save(
            {"state_dict": tensors} if kind == "wrapped" else tensors,
            path,
            _use_new_zipfile_serialization=kind != "legacy",
        )
    loaded = load_autoencoder(str(path), NARROW).state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_missing_surplus_and_reshaped_keys_are_named(tmp_path, narrow):
    tensors = dict(narrow.state_dict())
    del tensors["encoder.mid.attn_1.q.weight"]
    tensors["decoder.extra.weight"] = torch.zeros(1)
    tensors["quant_conv.bias"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "vae.pt")
    with pytest.raises(ConfigError) as error:
        load_autoencoder(str(tmp_path / "vae.pt"), NARROW)
    for words in (
        "--target.checkpoint",
        "1 missing (encoder.mid.attn_1.q.weight)",
        "1 surplus (decoder.extra.weight)",
        "1 of another shape (quant_conv.bias is (3,) instead of (8,))",
    ):
        assert words in str(error.value), str(error.value)


def test_a_file_of_something_else_is_refused(tmp_path, narrow):
    torch.save(
        narrow.state_dict() | {"post_quant_conv.weight": torch.zeros(5, 5, 1, 1)}, tmp_path / "mixed.pt"
    )
    torch.save(
        narrow.state_dict() | {"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, tmp_path / "odd.pt"
    )
    torch.save({"state_dict": {"vit.weight": torch.zeros(1)}}, tmp_path / "vit.pt")
    torch.save(dataclasses.replace(NARROW), tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    for name, words in {
        "mixed.pt": "of another shape",
        "odd.pt": "no multiples of the first convolution's 48",
        "vit.pt": "is no autoencoder's: it holds vit.weight",
        "object.pt": "plain tensors",
        "text.pt": "text.pt",
        "text.safetensors": "cannot be read",
        "none.pt": "no such file",
    }.items():
        with pytest.raises(ConfigError, match="--target.checkpoint") as error:
            load_autoencoder(str(tmp_path / name))
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_smaller_autoencoder_brings_its_own_shape(tmp_path, narrow):
    """What tools/train_vae.py writes: width, levels, blocks and channels are those of the tensors."""
    other = AutoencoderKL(AutoencoderShape(width=32, multipliers=(1, 2, 2, 4), blocks=1, latent=3))
    for name, autoencoder in {"narrow": narrow, "other": other}.items():
        path, statistics = tmp_path / f"{name}.pt", tmp_path / f"{name}-stats.pt"
        latent, stride = autoencoder.shape.latent, autoencoder.shape.stride
        torch.save({"state_dict": autoencoder.state_dict()}, path)
        torch.save({k: torch.ones(1, latent, 1, 1) for k in ("mean", "std")}, statistics)
        assert shape_of(str(path)) == autoencoder.shape
        config = recipes.get("tiny")
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, patch_size=stride),
            target=TargetConfig("va_vae", str(path), str(statistics)),
        )
        target = build_target(config, "cpu", torch.float32)
        assert target.channels == target_channels(config) == 2 * latent
        video = clip((1, 3, 2, 64, 64))
        assert target.latents(video).shape == (1, 1, (64 // stride) ** 2, 2 * latent)
        rebuilt = autoencoder.encode(video[0].transpose(0, 1))[0]
        assert torch.allclose(
            target.decode(target.latents(video))[0], autoencoder.decode(rebuilt).transpose(0, 1), atol=1e-3
        )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"mean": torch.zeros(1, 4, 1, 1)}, "no `std`"),
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 3, 1, 1)}, "(1, 3, 1, 1)"),
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.tensor([1.0, 0, 1, 1])}, "positive"),
        ({"mean": torch.full((4,), torch.nan), "std": torch.ones(4)}, "finite"),
    ],
)
def test_wrong_statistics_are_named(tmp_path, found, words):
    torch.save(found, tmp_path / "latents_stats.pt")
    with pytest.raises(ConfigError, match="--target.statistics") as error:
        load_statistics(str(tmp_path / "latents_stats.pt"), 4)
    assert words in str(error.value), str(error.value)


def test_training_without_the_files_names_the_flags(tmp_path):
    config = recipes.get("vit_l")
    with pytest.raises(ConfigError, match="--target.checkpoint FILE.*state_dict.*safetensors"):
        build_target(config, "cpu", torch.float32)
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, checkpoint="vae.pt"))
    with pytest.raises(ConfigError, match="--target.statistics FILE.*latents_stats.pt"):
        build_target(config, "cpu", torch.float32)


def test_a_file_that_is_missing_or_another_is_named_before_the_patch_size(tmp_path):
    config = recipes.get("tiny")
    for name, state, words in (
        ("none.pt", None, "none.pt: no such file, and VA-VAE's own would not fit: .*patch size"),
        ("vit.pt", {"cls_token": torch.zeros(1)}, "vit.pt is no autoencoder's: it holds cls_token"),
    ):
        if state:
            torch.save(state, tmp_path / name)
        target = dataclasses.replace(config.target, kind="va_vae", checkpoint=str(tmp_path / name))
        with pytest.raises(ConfigError, match=words):
            target_channels(dataclasses.replace(config, target=target))
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG no pickle")
    with pytest.raises(ConfigError, match="picture.pt (is not a torch file|cannot be read)") as error:
        shape_of(str(tmp_path / "picture.pt"))
    assert "In PyTorch" not in str(error.value)  # torch would have any file run its code
