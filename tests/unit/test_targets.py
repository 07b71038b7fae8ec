"""The target protocol, the pixel target, and what is refused before anything is built."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from unit.narrow_vae import clip

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig, TransformerShape
from nextvid_mcore.targets import Target, build_target, target_channels, width_note
from nextvid_mcore.targets.pixels import Pixels

SHAPE = TransformerShape(width=24, depth=1, heads=2, mlp=48)


def model(**changes: int) -> ModelConfig:
    return ModelConfig(encoder=SHAPE, **{"image_size": 24, "patch_size": 8, "tubelet_size": 2} | changes)


def run(name: str = "tiny", target: dict | None = None, **changes: int) -> RunConfig:
    config = recipes.get(name)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes),
        mask=dataclasses.replace(config.mask, mode="packed"),  # any grid will do
        target=dataclasses.replace(config.target, **(target or {})),
    )


def test_pixels_put_every_value_where_its_patch_says():
    video = clip((2, 3, 4, 24, 24))
    tokens = Pixels(model()).latents(video)
    assert tokens.shape == (2, 2, 9, 384) and tokens.dtype == torch.float32
    for b, t, y, x, c, dt, dy, dx in [
        (0, 0, 0, 0, 0, 0, 0, 0),
        (1, 1, 2, 1, 2, 1, 7, 3),
        (0, 1, 1, 2, 1, 0, 5, 6),
    ]:
        flat = ((c * 2 + dt) * 8 + dy) * 8 + dx
        assert tokens[b, t, y * 3 + x, flat] == video[b, c, t * 2 + dt, y * 8 + dy, x * 8 + dx]


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_pixels_are_exactly_invertible(tubelet: int):
    target = Pixels(model(tubelet_size=tubelet))
    video = clip((2, 3, 6, 24, 24))
    tokens = target.latents(video)
    assert tokens.shape == (2, 6 // tubelet, 9, target.channels)
    assert torch.equal(target.decode(tokens), video)


def test_pixels_of_later_frames_alone():
    target, video = Pixels(model(), scale=2.0), clip((2, 3, 6, 24, 24))
    assert torch.equal(target.latents(video, first=1), target.latents(video)[:, 1:])


def test_pixels_carry_no_gradient_and_ignore_the_static_cue():
    target = Pixels(model())
    video = clip((2, 3, 1, 24, 24)).expand(2, 3, 4, 24, 24)
    assert not target.latents(video.clone().requires_grad_()).requires_grad
    assert torch.equal(target.latents(video), target.latents(video, static=torch.tensor([True, False])))


def test_build_target_follows_the_recipe():
    config = recipes.get("tiny")
    target = build_target(config, "cpu", torch.float32)
    assert isinstance(target, Target) and isinstance(target, Pixels)
    assert target.channels == target_channels(config) == config.model.patch_dim == 384


@pytest.mark.parametrize("name", ["vit_l", "vit_h", "vit_g"])
def test_the_papers_recipes_have_64_channels_without_a_checkpoint(name: str):
    assert target_channels(recipes.get(name)) == 64


def test_a_decoder_narrower_than_its_target_is_said():
    assert "width of 192 is below the target's 384 channels" in width_note(recipes.get("digits_32"))
    assert "0.50 of the flow loss" in width_note(recipes.get("digits_32"))
    for name in ("digits_film", "vit_l", "table2_align"):  # wide enough, or nothing is generated
        assert width_note(recipes.get(name)) is None


def test_other_tubelets_stack_as_many_frames():
    assert target_channels(run("vit_l", tubelet_size=4)) == 128
    assert target_channels(run("vit_l", tubelet_size=1)) == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_size=72, patch_size=8), ["multiple of 16", "72"]),
        (dict(image_size=64, patch_size=8), ["16 x 16", "patch size is 8", "--model.patch-size 16"]),
        (dict(image_size=64, patch_size=32), ["16 x 16", "patch size is 32"]),
    ],
)
def test_va_vae_refuses_a_grid_that_is_not_the_tokens(changes: dict, words: list[str]):
    config = run("tiny", target={"kind": "va_vae"}, **changes)
    for check in (lambda: target_channels(config), lambda: build_target(config, "cpu", torch.float32)):
        with pytest.raises(ConfigError) as error:
            check()
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.zeros(3, 4, 24, 24), "[B, 3, T, H, W]"),
        (torch.zeros(1, 3, 4, 24, 24, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 4, 16, 24), "16 x 24"),
        (torch.zeros(1, 3, 3, 24, 24), "3 frames"),
    ],
)
def test_wrong_video_is_named(video: torch.Tensor, words: str):
    with pytest.raises(ConfigError) as error:
        Pixels(model()).latents(video)
    assert words in str(error.value)


def test_wrong_latents_are_named():
    with pytest.raises(ConfigError, match=r"\[B, t, 9, 384\]"):
        Pixels(model()).decode(torch.zeros(1, 2, 9, 64))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            {"kind": "pixels", "checkpoint": "vae.pt"},
            "--target.checkpoint vae.pt: target pixels reads no file",
        ),
        ({"kind": "pixels", "statistics": "s.pt"}, "--target.statistics s.pt: target pixels reads no file"),
        (
            {"kind": "cosmos", "sample_posterior": True},
            "--target.sample-posterior says nothing with .* cosmos",
        ),
    ],
)
def test_settings_that_a_target_would_pass_over_are_refused(target: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        run(target=target)
