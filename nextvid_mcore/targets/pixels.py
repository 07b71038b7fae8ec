"""Pixels as the target: each token's own patch of the video, flattened (Table 3, row "pixel").

No statistics: the values stay in [-1, 1], in which natural clips have a standard deviation of about a
half, near enough to the unit noise of the flow. Flatter data needs `scale`, or the flow loss says almost
nothing of them (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.targets.base import check_latents, check_video


class Pixels:
    """Patches flattened (c, dt, dy, dx), exactly invertible; implements `Target`."""

    def __init__(self, model: ModelConfig, scale: float = 1.0) -> None:
        self.model, self.scale = model, scale
        self.channels = self.channels_for(model)

    @staticmethod
    def channels_for(model: ModelConfig) -> int:
        """C = 3 * tubelet * patch * patch."""
        return model.patch_dim

    @torch.no_grad()
    def latents(
        self,
        video: Tensor,
        static: Tensor | None = None,
        indices: Sequence[int] | None = None,
        first: int = 0,
    ) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> [B, t - first, n, C]; `static`, `indices` make no difference."""
        check_video(video, self.model)
        return rearrange(
            video[:, :, first * self.model.tubelet_size :].float() * self.scale,
            "b c (t dt) (h dy) (w dx) -> b t (h w) (c dt dy dx)",
            dt=self.model.tubelet_size,
            dy=self.model.patch_size,
            dx=self.model.patch_size,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, t, n, C] -> [B, 3, T, H, W]."""
        check_latents(latents, self.model, self.channels)
        return rearrange(
            latents.float() / self.scale,
            "b t (h w) (c dt dy dx) -> b c (t dt) (h dy) (w dx)",
            h=self.model.grid,
            c=3,
            dt=self.model.tubelet_size,
            dy=self.model.patch_size,
        )
