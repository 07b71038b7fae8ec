"""The conditioned flow decoder as plain PyTorch (Eq. 6 to 8): the velocity of noisy frames given z.

A DiT on concat(z, noisy latent) with AdaLN on tau. Attention stays inside a frame (Figure 3, right), so
frames are rows of a batch here. Integrate the velocity from noise (tau 0) to data (tau 1) to generate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvid_mcore.hub.vit import MLP, SelfAttention, grid_positions, rope_angles

TAU_WIDTH = 256  # of the sinusoidal embedding of tau


def timestep_embedding(tau: Tensor, width: int = TAU_WIDTH) -> Tensor:
    """[...] in (0, 1) -> [..., width], float32: cosines, then sines, of 1000 tau; periods up to 10000."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=tau.device) / half
    angles = 1000.0 * tau.float()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiTBlock(nn.Module):
    """AdaLN-zero block; `adaln` gives shift, scale and gate of the attention, then of the MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.adaln = nn.Linear(width, 6 * width)
        self.attn = SelfAttention(width, heads)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        """x [B*p, n, E], condition [B*p, 1, E] (after SiLU)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1, angles, None)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Decoder(nn.Module):
    def __init__(
        self,
        *,
        grid: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.grid, self.channels = grid, channels  # the grid of the pretraining; others work too
        self.head_width, self.rope_base = width // heads, rope_base
        self.input = nn.Linear(width + channels, width)
        self.tau_embed = nn.Sequential(nn.Linear(TAU_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_width, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.final_adaln = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)

    @classmethod
    def from_config(cls, config: dict) -> Decoder:
        return cls(
            grid=config["image_size"] // config["patch_size"],
            channels=config["target_channels"],
            width=config["decoder_width"],
            depth=config["decoder_depth"],
            heads=config["decoder_heads"],
            mlp_width=config["decoder_mlp_width"],
            norm_eps=config["norm_eps"],
            rope_base=config["rope_base"],
        )

    def forward(
        self, noisy: Tensor, tau: Tensor, z: Tensor, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """noisy [B, p*n, C], tau [B, p], z [B, p*n, E] of the predictor -> velocity [B, p*n, C].

        Any number p of frames; grid: (h, w) of a frame's tokens (default: the pretraining's).
        """
        h, w = grid or (self.grid, self.grid)
        if (
            tau.dim() != 2
            or noisy.shape[:2] != z.shape[:2]
            or noisy.shape[:2] != (len(tau), tau.shape[1] * h * w)
        ):
            raise ValueError(
                f"noisy {tuple(noisy.shape)}, tau {tuple(tau.shape)} and z {tuple(z.shape)} on a {h} x {w} "
                f"grid: give [B, p*{h * w}, {self.channels}], [B, p] and [B, p*{h * w}, E]"
            )
        x = self.input(torch.cat([z, noisy], dim=-1)).reshape(tau.numel(), h * w, -1)  # [B*p, n, E]
        embedding = timestep_embedding(tau.flatten()).to(x.dtype)
        condition = F.silu(self.tau_embed(embedding))[:, None]  # [B*p, 1, E]
        # RoPE depends on differences only, and all tokens of a row have the same frame: t is 0.
        angles = rope_angles(grid_positions(1, h, w, x.device), self.head_width, self.rope_base)[None, None]
        for block in self.blocks:
            x = block(x, condition, angles)
        shift, scale = self.final_adaln(condition).chunk(2, dim=-1)
        return self.output(self.norm(x) * (1 + scale) + shift).reshape(noisy.shape)
