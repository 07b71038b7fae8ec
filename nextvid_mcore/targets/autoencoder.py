"""The convolutional KL autoencoder behind VA-VAE ("f16d32"): images to a 16 times smaller grid and back.

Source: latent diffusion's AutoencoderKL in the shape LightningDiT trains it: width 128, multipliers
(1, 1, 2, 2, 4), two residual blocks a level, attention at the last level, 32 latent channels, 69.8M
parameters. Attribute names are those of its checkpoint, so that it loads strictly; where a name looks
odd here ("nin_shortcut", "quant_conv"), that is why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nextvid_mcore.config import require

GROUPS, EPS = 32, 1e-6  # of every GroupNorm


@dataclass(frozen=True)
class AutoencoderShape:
    """Sizes of the autoencoder; the defaults are VA-VAE's."""

    width: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of a level / width; one level halves the grid
    blocks: int = 2  # residual blocks of an encoder level; the decoder has one more
    latent: int = 32

    def __post_init__(self) -> None:
        require(
            self.width > 0 and self.width % GROUPS == 0,
            f"autoencoder width {self.width} must be a multiple of {GROUPS}, the groups of its norms",
        )

    @property
    def stride(self) -> int:
        """Pixels (in each direction) of one latent position."""
        return 2 ** (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice; the shortcut is 1x1 where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        return out + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    """One head as wide as the channels, over all positions of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [N, 1, positions, channels]
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the grid. Zeros are added at the bottom and the right only, as in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `attend`, then a resampling.

    `resample` is the name and module of what changes the resolution, None at the far end.
    """

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attend: bool, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(SelfAttention(outputs) for _ in range(blocks if attend else 0))
        self.resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """Two residual blocks round attention, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SelfAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ImageEncoder(nn.Module):
    """[N, 3, H, W] -> [N, 2 latent, H / stride, W / stride]."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        widths = [shape.width * m for m in shape.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, shape.width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[i - 1] if i else shape.width,
                width,
                shape.blocks,
                attend=i == last,
                resample=("downsample", Downsample(width)) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * shape.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class ImageDecoder(nn.Module):
    """[N, latent, h, w] -> [N, 3, h * stride, w * stride]. Level 0 is the finest, as in the encoder."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        widths = [shape.width * m for m in shape.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(shape.latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                width,
                shape.blocks + 1,
                attend=i == last,
                resample=("upsample", Upsample(width)) if i > 0 else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """An image autoencoder whose latent is a diagonal normal distribution at every position."""

    def __init__(self, shape: AutoencoderShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or AutoencoderShape()
        self.encoder = ImageEncoder(shape)
        self.decoder = ImageDecoder(shape)
        self.quant_conv = nn.Conv2d(2 * shape.latent, 2 * shape.latent, 1)
        self.post_quant_conv = nn.Conv2d(shape.latent, shape.latent, 1)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] in [-1, 1] -> mean and log variance (clamped to [-30, 20]), [N, latent, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(frames)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """[N, latent, h, w] -> frames [N, 3, H, W], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, frames: Tensor) -> Tensor:
        """Reconstruct from the posterior's mean."""
        return self.decode(self.encode(frames)[0])
