"""Crops, scaling and normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nextvid_mcore.data.transforms import Crop, centre_crop, normalize, random_crop, resize_clip


@pytest.mark.parametrize(("height", "width"), [(240, 320), (64, 64), (1080, 200)])
def test_random_crops_lie_inside_and_have_the_asked_size(height: int, width: int) -> None:
    crops = [
        random_crop(np.random.default_rng(i), height, width, (0.3, 1.0), (0.75, 1.35)) for i in range(300)
    ]
    for top, left, h, w in crops:
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
    if (height, width) == (240, 320):
        areas = np.array([c.height * c.width / (240 * 320) for c in crops])
        aspects = np.array([c.width / c.height for c in crops])
        assert areas.min() == pytest.approx(0.3, abs=0.02) and 0.9 < areas.max() <= 1
        assert 0.74 < aspects.min() < 0.8 and 1.28 < aspects.max() < 1.37
        assert len({c.top for c in crops}) > 50 and len({c.left for c in crops}) > 80


def test_a_frame_too_long_for_any_crop_gets_the_largest_centred_one() -> None:
    crop = random_crop(np.random.default_rng(0), 1000, 10, (0.9, 1.0), (0.75, 1.35))
    assert crop == Crop(493, 0, 13, 10)
    crop = random_crop(np.random.default_rng(0), 10, 1000, (0.9, 1.0), (0.75, 1.35))
    assert crop == Crop(0, 493, 10, 14)


def test_centre_crop() -> None:
    assert centre_crop(48, 64) == Crop(0, 8, 48, 48)
    assert centre_crop(65, 48) == Crop(8, 0, 48, 48)


def test_all_frames_get_the_same_crop_flip_and_scale() -> None:
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 256, (1, 30, 40, 3), dtype=np.uint8), 4, axis=0)
    clip = resize_clip(frames, Crop(3, 5, 20, 24), 16, flip=True)
    assert clip.shape == (3, 4, 16, 16) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert all(torch.equal(clip[:, 0], clip[:, t]) for t in range(4))
    straight = resize_clip(frames, Crop(3, 5, 20, 24), 16, flip=False)
    assert torch.equal(clip, straight.flip(-1)) and not torch.equal(clip, straight)


def test_the_crop_is_the_one_asked_for_and_scaling_is_antialiased() -> None:
    """A crop of the final size is copied; a fine checkerboard scaled by a quarter becomes its mean."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    same = resize_clip(frames, Crop(7, 11, 16, 16), 16, flip=False)
    assert np.array_equal(same.numpy(), frames[:, 7:23, 11:27].transpose(3, 0, 1, 2))
    board = np.zeros((1, 64, 64, 3), np.uint8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 200
    inner = resize_clip(board, Crop(0, 0, 64, 64), 16, flip=False)[..., 2:-2, 2:-2]
    assert (inner.int() - 100).abs().max() <= 2


def test_normalize() -> None:
    video = torch.tensor([0, 51, 127, 128, 255], dtype=torch.uint8)
    assert normalize(video).tolist() == pytest.approx([-1, -0.6, -1 / 255, 1 / 255, 1], abs=1e-6)
    assert video[1] == 51 and normalize(video, torch.bfloat16).dtype == torch.bfloat16
