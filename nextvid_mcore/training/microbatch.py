"""From a loaded clip batch to what the networks read: patches, masks, latents.

Masks come from (seed, sample index) and are drawn again wherever they are needed; they never travel.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from nextvid_mcore.config import RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.masking import draw_masks
from nextvid_mcore.models import fused
from nextvid_mcore.models.nextvid import MicroBatch
from nextvid_mcore.models.sequences import patchify, visible_patches
from nextvid_mcore.parallel.split import DTYPES
from nextvid_mcore.targets import Target
from nextvid_mcore.transfer import to_device


@dataclass(frozen=True)
class Outline:
    """What is known of a micro-batch before its pixels: all that its draws depend on but the seed."""

    frames: int  # T
    index: tuple[int, ...]  # global sample indices
    tau_samples: int

    @classmethod
    def of(cls, clip: ClipBatch, tau_samples: int) -> Outline:
        return cls(clip.video.shape[2], tuple(clip.index.tolist()), tau_samples)

    def share(self, shares: int, number: int) -> Outline:
        """Of `clip_share`'s clips."""
        return dataclasses.replace(self, index=self.index[_stretch(len(self.index), shares, number)])


def patches_of(config: RunConfig, video: Tensor) -> Tensor:
    """Every patch of clips uint8 [B, 3, T, H, W]: [B, t * n, patch_dim] in [-1, 1], the run's precision."""
    dtype = DTYPES[config.train.precision]
    return patchify(video, config.model, lambda x: fused.pixels(x, dtype))


def full_patches(config: RunConfig, clip: ClipBatch, device: torch.device) -> Tensor:
    """Every patch of the clips, [B, t * n, patch_dim] in [-1, 1]."""
    return patches_of(config, clip.video.to(device, non_blocking=True))


def clip_share(clip: ClipBatch, shares: int, number: int) -> ClipBatch:
    """Clips of one of `shares` equal stretches of a batch."""
    mine = _stretch(len(clip.index), shares, number)
    names = ("video", "index", "label", "static", "items")
    return dataclasses.replace(clip, **{name: getattr(clip, name)[mine] for name in names})


def _stretch(clips: int, shares: int, number: int) -> slice:
    size = clips // shares
    return slice(number * size, (number + 1) * size)


def make_micro_batch(
    config: RunConfig, outline: Outline, device: torch.device, seed: int | None = None
) -> MicroBatch:
    """Indices and masks of the clips; patches, features and latents are added by who reads them.

    Args:
        seed: of masks, tau and noise; None: the run's. Held-out loss passes its own.
    """
    t = config.model.token_frames(outline.frames)
    index = list(outline.index)
    seed = config.train.seed if seed is None else seed
    masks = draw_masks(config.mask, config.model.grid, t - 1, seed, index)
    return MicroBatch(
        index=index,
        seed=seed,
        token_frames=t,
        tau_samples=outline.tau_samples,
        masks=dataclasses.replace(masks, tokens=to_device(masks.tokens, device)),
    )


def with_patches(batch: MicroBatch, patches: Tensor) -> MicroBatch:
    """Add the visible ones of `patches` [B, t * n, patch_dim]."""
    return dataclasses.replace(batch, patches=visible_patches(patches, batch.masks))


@torch.no_grad()
def predicted_latents(clip: ClipBatch, target: Target, device: torch.device) -> Tensor:
    """The target's latents of frames 1 .. t-1, [B, p, n, C]."""
    video = fused.pixels(clip.video.to(device, non_blocking=True), torch.float32)
    return target.latents(video, clip.static, clip.index.tolist(), first=1)
