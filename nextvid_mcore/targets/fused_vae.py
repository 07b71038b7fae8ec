"""VA-VAE's encoder with its convolutions by cuDNN and its norms by Triton (targets/triton_vae.py).

A residual is added by the convolution that ends its block (targets/cudnn_conv.py), a block's first bias by
the norm that follows. The reference is AutoencoderKL.encode, eager.

Everything is turned by 180 degrees: the frames, every window of weights, and in the end the latents back.
What the autoencoder pads at the bottom and the right before it halves the grid then lies at the top and the
left, where a convolution's own padding of 1 is all that a stride of 2 meets: nothing is copied into a border.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvid_mcore.config import require
from nextvid_mcore.targets.autoencoder import (
    AutoencoderKL,
    AutoencoderShape,
    ResidualBlock,
    SelfAttention,
)
from nextvid_mcore.targets.cudnn_conv import convolve
from nextvid_mcore.targets.triton_vae import WHOLE, Tuning, begin, matrix_of, nchw, nhwc, normalise, shares


def check(shape: AutoencoderShape) -> None:
    """ConfigError unless Triton's blocks fit: channels in powers of two."""
    widths = [shape.width * m for m in shape.multipliers]
    require(
        all(w & (w - 1) == 0 for w in widths),
        f"the autoencoder's widths {widths} are not all powers of two, which --target.compile True needs: "
        "set --target.compile False",
    )


class FusedEncoder:
    """Stands for `autoencoder.encode`, whose weights may not change after."""

    def __init__(self, autoencoder: AutoencoderKL, tuning: Tuning = WHOLE) -> None:
        check(autoencoder.shape)
        self.encoder, self.quant_conv = autoencoder.encoder, autoencoder.quant_conv
        self.tuning = tuning
        self.turned = {
            id(m): m.weight.flip(2, 3).contiguous(memory_format=torch.channels_last)
            for m in self.encoder.modules()
            if isinstance(m, nn.Conv2d)
        }
        self.first = matrix_of(self.turned[id(self.encoder.conv_in)])
        self.packed = {
            id(m): (
                torch.cat([part.weight.flatten(1) for part in (m.q, m.k, m.v)]),
                torch.cat([part.bias for part in (m.q, m.k, m.v)]),
            )
            for m in self.encoder.modules()
            if isinstance(m, SelfAttention)
        }
        norms = [m for m in self.encoder.modules() if isinstance(m, nn.GroupNorm)]
        self.norms, self.shares = len(norms), max(shares(norm.num_channels) for norm in norms)
        self.zeros = {norm.num_channels: torch.zeros_like(norm.bias) for norm in norms}

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W], multiples of the stride -> mean and log variance, [N, latent, h, w]."""
        arrived = torch.zeros(self.norms, self.shares * len(frames), dtype=torch.int32, device=frames.device)
        self.arrived = iter(arrived.unbind())
        frames = frames.flip(2, 3).contiguous()
        conv, norm = self.encoder.conv_in, self.encoder.down[0].block[0].norm1
        normed, x = begin(frames, self.first, conv.bias, norm.weight, norm.bias, next(self.arrived))
        for level in self.encoder.down:
            for i, block in enumerate(level.block):
                x = self._block(block, x, normed)
                normed = None
                if level.attn:
                    x = self._attend(level.attn[i], x)
            if level.resample:
                conv = level.downsample.conv
                x = nhwc(convolve(nchw(x), self.turned[id(conv)], conv.bias, stride=2))
        mid = self.encoder.mid
        x = self._block(mid.block_2, self._attend(mid.attn_1, self._block(mid.block_1, x)))
        last = self.encoder.conv_out
        out = F.conv2d(
            nchw(self._norm(self.encoder.norm_out, x)), self.turned[id(last)], last.bias, padding=1
        )
        mean, logvar = self.quant_conv(out).flip(2, 3).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def _norm(self, norm: nn.GroupNorm, x: Tensor, bias: Tensor | None = None, **how: bool) -> Tensor:
        """x + bias, normalised, with SiLU."""
        bias = self.zeros[norm.num_channels] if bias is None else bias
        return normalise(x, norm.weight, norm.bias, next(self.arrived), bias=bias, tuning=self.tuning, **how)

    def _block(self, block: ResidualBlock, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """normed: of x, where it is there already."""
        normed = self._norm(block.norm1, x) if normed is None else normed
        inner = F.conv2d(nchw(normed), self.turned[id(block.conv1)], padding=1)
        inner = nhwc(inner.contiguous(memory_format=torch.channels_last))
        del normed
        normed = self._norm(block.norm2, inner, block.conv1.bias, in_place=True)
        if hasattr(block, "nin_shortcut"):
            x = F.linear(x, block.nin_shortcut.weight.flatten(1), block.nin_shortcut.bias)
        return nhwc(convolve(nchw(normed), self.turned[id(block.conv2)], block.conv2.bias, nchw(x)))

    def _attend(self, attention: SelfAttention, x: Tensor) -> Tensor:
        N, H, W, C = x.shape
        normed = self._norm(attention.norm, x, silu=False)
        q, k, v = F.linear(normed.view(N, 1, H * W, C), *self.packed[id(attention)]).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)
        return x + F.linear(mixed, attention.proj_out.weight.flatten(1), attention.proj_out.bias)
