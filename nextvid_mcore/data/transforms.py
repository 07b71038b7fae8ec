"""Crop, flip, scale: one crop for all frames of a clip. Normalisation waits for the clip's device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

GPU_FRAMES = 16  # resized at a time on a GPU, as fp32: bounds the memory of long clips


class Crop(NamedTuple):
    top: int
    left: int
    height: int
    width: int


def random_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> Crop:
    """A box with a uniform share of the frame's area and a log-uniform aspect (width / height).

    Where ten draws don't fit (a very long frame), the largest centred box with the nearest legal aspect.
    """
    low, high = np.log(aspect)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(low, high))
        h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    h, w = height, width
    if width < height * aspect[0]:
        h = max(1, round(width / aspect[0]))
    elif width > height * aspect[1]:
        w = max(1, round(height * aspect[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def centre_crop(height: int, width: int) -> Crop:
    """The largest centred square."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def resize_clip(frames: np.ndarray | torch.Tensor, crop: Crop, size: int, flip: bool) -> torch.Tensor:
    """uint8 [T, height, width, 3] -> uint8 [3, T, size, size] on the same device: bilinear, antialiased."""
    top, left, h, w = crop
    clip = torch.as_tensor(frames)[:, top : top + h, left : left + w].permute(0, 3, 1, 2)  # [T, 3, h, w]
    if (h, w) != (size, size):
        clip = _scale(clip, size) if clip.is_cuda else _interpolate(clip, size)
    if flip:
        clip = clip.flip(-1)
    return clip.transpose(0, 1).contiguous()


def _interpolate(clip: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(clip, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _scale(clip: torch.Tensor, size: int) -> torch.Tensor:
    """`_interpolate` where torch has no kernel of it for uint8; both round to the nearest."""
    parts = [_interpolate(part.float(), size).round_().clamp_(0, 255) for part in clip.split(GPU_FRAMES)]
    return torch.cat([part.to(torch.uint8) for part in parts])


def normalize(video: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 -> float in [-1, 1], same shape: mean 0.5 and deviation 0.5 (Table 8)."""
    return video.to(dtype) / 127.5 - 1.0
