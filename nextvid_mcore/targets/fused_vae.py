"""VA-VAE's encoder with its convolutions by cuDNN and all between them by Triton (targets/triton_vae.py).

What is carried from block to block is a sum that is not yet added up: a residual, the last convolution, and
the biases of both, which no convolution adds. The reference is AutoencoderKL.encode, eager.

Everything is turned by 180 degrees: the frames, every window of weights, and in the end the latents back.
What the autoencoder pads at the bottom and the right before it halves the grid then lies at the top and the
left, where a convolution's own padding of 1 is all that a stride of 2 meets: nothing is copied into a border.
"""

from __future__ import annotations

import dataclasses

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
from nextvid_mcore.targets.triton_vae import Sum, Tuning, add, matrix_of, nchw, nhwc, normalise


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

    def __init__(self, autoencoder: AutoencoderKL, tuning: Tuning | None = None) -> None:
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
        self.norms = sum(isinstance(m, nn.GroupNorm) for m in self.encoder.modules())
        self.biases: dict[tuple[int, int], Tensor] = {}
        widths = {norm.num_channels for norm in self.encoder.modules() if isinstance(norm, nn.GroupNorm)}
        self.zeros = {width: torch.zeros(width, device=self.first.device) for width in widths}

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W], multiples of the stride -> mean and log variance, [N, latent, h, w]."""
        arrived = torch.zeros(self.norms, len(frames), dtype=torch.int32, device=frames.device)
        self.arrived = iter(arrived.unbind())
        frames = frames.flip(2, 3).contiguous()
        x = Sum(self._bias(self.encoder.conv_in), frames=frames, first=self.first)
        for level in self.encoder.down:
            for i, block in enumerate(level.block):
                x = self._block(block, x)
                if level.attn:
                    x = self._attend(level.attn[i], x)
            if level.resample:
                conv = level.downsample.conv
                x = Sum(self._bias(conv), (self._conv(conv, add(x)),))
        mid = self.encoder.mid
        x = self._block(mid.block_2, self._attend(mid.attn_1, self._block(mid.block_1, x)))
        normed, _ = self._norm(self.encoder.norm_out, x)
        last = self.encoder.conv_out
        out = self.quant_conv(F.conv2d(nchw(normed), self.turned[id(last)], last.bias, padding=1))
        mean, logvar = out.flip(2, 3).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def _bias(self, conv: nn.Conv2d, before: Tensor | None = None) -> Tensor:
        """fp32, made once: that of a convolution and of a sum that it is added to, or is the shortcut of."""
        if before is None:
            before = self.zeros[conv.out_channels]
        key = id(before), id(conv)
        if key not in self.biases:
            if len(before) != conv.out_channels:  # a shortcut's input
                before = conv.weight.flatten(1).float() @ before
            self.biases[key] = before + conv.bias.float()
        return self.biases[key]

    def _norm(self, norm: nn.GroupNorm, x: Sum, **how: bool) -> tuple[Tensor, Sum]:
        """Normalised x with SiLU; and x, added up where it had two parts."""
        keep = len(x.parts) > 1
        normed, kept = normalise(
            x, norm.weight, norm.bias, next(self.arrived), keep=keep, tuning=self.tuning, **how
        )
        return normed, Sum(self.zeros[len(x.bias)], (kept,)) if keep else x

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H', W', C'], without its bias."""
        weight = self.turned[id(conv)]
        out = F.conv2d(nchw(x), weight, None, conv.stride, weight.shape[-1] // 2)
        return nhwc(out.contiguous(memory_format=torch.channels_last))

    def _block(self, block: ResidualBlock, x: Sum) -> Sum:
        normed, x = self._norm(block.norm1, x)
        out = Sum(self._bias(block.conv1), (self._conv(block.conv1, normed),))
        del normed
        normed, _ = self._norm(block.norm2, out, in_place=True)
        out = self._conv(block.conv2, normed)
        if hasattr(block, "nin_shortcut"):
            if x.frames is not None:
                x = Sum(self.zeros[len(x.bias)], (add(x),))
            short = block.nin_shortcut  # of a sum of one part, whose bias goes through by itself
            x = Sum(self._bias(short, x.bias), (self._conv(short, x.parts[0]),))
        return dataclasses.replace(x, bias=self._bias(block.conv2, x.bias), parts=(*x.parts, out))

    def _attend(self, attention: SelfAttention, x: Sum) -> Sum:
        normed, x = self._norm(attention.norm, x, silu=False)
        weight, bias = self.packed[id(attention)]
        N, H, W, C = normed.shape
        q, k, v = F.linear(normed.view(N, 1, H * W, C), weight, bias).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v).reshape(N, H, W, C)
        mixed = F.linear(mixed, attention.proj_out.weight.flatten(1))
        return dataclasses.replace(x, bias=self._bias(attention.proj_out, x.bias), parts=(*x.parts, mixed))
