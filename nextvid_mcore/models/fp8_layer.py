"""An encoder layer in FP8 with `delayed` scales: what makes a linear's input or its gradient writes FP8 too.

    norms       the inputs of queries-keys-values and of the MLP; in passes with gradients in both directions
    attention   the output linear's input, where no gradient is wanted (models/triton_prefix.py)
    rotation    going back, the gradient of queries-keys-values in both directions, with the bias's
    GELU        models/fp8_mlp.py

So runs the reference, which sees twice the student's tokens and needs one direction of everything, and the
student. Transformer Engine renews `delayed`'s scales of gradients when the backward pass of a pass's first
linear is over; here that is queries-keys-values of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextvid_mcore import switches
from nextvid_mcore.models import carried, fp8_mlp, fused
from nextvid_mcore.models.fp8_products import (
    GRADIENT,
    INPUT,
    as_te,
    for_backward,
    opened,
    product,
    torch_dtype,
    weight,
    weight_gradient,
)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from nextvid_mcore.models.attention import AttentionPattern


def fits(config: TransformerConfig, x: Tensor) -> bool:
    """Whether a layer of `config` goes this way with the input `x`."""
    return fp8_mlp.fits(config, x) and (switches.on("trained") or not torch.is_grad_enabled())


def encoder_layer(
    layer: TransformerLayer, x: Tensor, rope: Tensor | None, pattern: AttentionPattern | None
) -> Tensor:
    """What EncoderLayer does: x [s, rows, D] -> the same shape."""
    attention, mlp, size, trained = layer.self_attention, layer.mlp, x.shape, torch.is_grad_enabled()
    eps, (y, bias) = layer.config.layernorm_epsilon, carried.pending(layer) or (None, None)
    flat, y = x.flatten(0, 1), None if y is None else y.flatten(0, 1)
    qkv, norm, turning = attention.linear_qkv, layer.input_layernorm, Turning.of(attention, flat, trained)
    flat, *parts = _NormTurn.apply(
        flat, y, bias, norm.weight, norm.bias, qkv.weight, qkv.bias, *rope.flatten(1, 2), turning, eps
    )
    y, bias = _project(attention, [part.unflatten(0, size[:2]) for part in parts], pattern, trained)
    norm, inside = layer.pre_mlp_layernorm, fp8_mlp.Inside.of(mlp, flat)
    one, two = inside.linears
    flat, y = _NormMlp.apply(
        flat, y.flatten(0, 1), bias, norm.weight, norm.bias, one.weight, one.bias, two.weight, inside, eps
    )
    leave = carried.left if switches.on("carry") else lambda _, *added: fused.add(*added)
    return leave(layer, flat.view(size), y.view(size), two.bias)


def _project(
    attention: Any, parts: list[Tensor], pattern: AttentionPattern | None, trained: bool
) -> tuple[Tensor, Tensor]:
    """Attention and its output linear: q, k, v [s, rows, A, d] -> [s, rows, D], and the bias to be added."""
    linear = attention.linear_proj
    if trained or not switches.on("attention"):
        return linear(attention.attend(*parts, pattern))
    q = parts[0]
    quantizers = opened(linear, q, False)
    to = quantizers[INPUT]
    low = to.scale, to.amax, torch_dtype(to)
    found = attention.core_attention(
        *parts, None, attn_mask_type=attention.attn_mask_type, attention_bias=pattern, low=low
    )
    if isinstance(found, Tensor):
        to.set_usage(rowwise=True, columnwise=False)
        found = to(found.flatten(0, 1))
    else:
        found = as_te(found, to, q.dtype)
    y = product(weight(linear, quantizers, False), found, q.dtype)
    return y.view(*q.shape[:2], -1), linear.bias


def _normed(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, float],
    to: Any,
    trained: bool,
) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    """x (+ y + bias), its norm as the quantiser `to` has it, and what the backward pass needs of it."""
    from nextvid_mcore.models import triton_fp8

    made = triton_fp8.norm_both if trained else triton_fp8.norm
    total, scaled, *rest = made(x, y, bias, *norm, to.scale, to.amax, torch_dtype(to))
    return total, as_te(scaled, to, x.dtype), tuple(rest)


def _norm_backward(ctx: Any, dnormed: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, bias and the norm's parameters."""
    from nextvid_mcore.models import triton_pieces

    total, mean, rstd, scale, *_ = ctx.saved_tensors
    dx, dweight, dshift, *dbias = triton_pieces.norm_backward(
        dnormed, dtotal, total, mean, rstd, scale, linear=ctx.added
    )
    return dx, *((dx, *dbias) if ctx.added else (None, None)), dweight, dshift


@dataclass
class Turning:
    """The linear of queries, keys and values in one pass, and what its backward pass reads."""

    linear: Any
    quantizers: tuple
    heads: int
    trained: bool
    kept: tuple | None = None
    first: bool = False

    @classmethod
    def of(cls, attention: Any, x: Tensor, trained: bool) -> Turning:
        linear = attention.linear_qkv
        return cls(linear, opened(linear, x, trained), attention.num_attention_heads_per_partition, trained)

    def forward(self, low: Any, bias: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """[N, D] in FP8 -> queries, keys and values, turned: [N, A, d] each."""
        from nextvid_mcore.models import triton_pieces

        low_weight = weight(self.linear, self.quantizers, self.trained)
        packed = product(low_weight, low, dtype, bias=bias).view(len(cos), self.heads, 3, -1)
        parts = packed.unbind(2)
        triton_pieces.turn(parts, packed, cos, sin, back=False)
        if self.trained:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            for_backward(self.linear, low_weight, low)
            self.kept = low, low_weight, cos, sin
            self.first = FP8GlobalStateManager.is_first_fp8_module()
        return parts

    def backward(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of the input [N, D], of the weight and of the bias."""
        from nextvid_mcore.models import triton_fp8

        (low, low_weight, cos, sin), self.kept, dtype = self.kept, None, grads[0].dtype
        to = self.quantizers[GRADIENT]
        scaled, dbias = triton_fp8.turn_backward(grads, cos, sin, to.scale, to.amax, torch_dtype(to))
        low_dy = as_te(scaled, to, dtype)
        dx = product(low_weight, low_dy, dtype, layout="NN", grad=True)
        return dx, weight_gradient(self.linear, low, low_dy), dbias

    def finish(self) -> None:
        """To be called where the backward pass of what this linear is a part of ends."""
        if self.first:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


class _NormTurn(torch.autograd.Function):
    """x + y + bias [N, D]; its norm's queries, keys and values, turned: [N, A, d] each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        added: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        turning: Turning,
        eps: float,
    ) -> tuple[Tensor, ...]:
        norm = norm_weight, norm_bias, eps
        total, low, rest = _normed(x, y, added, norm, turning.quantizers[INPUT], turning.trained)
        parts = turning.forward(low, linear_bias, cos, sin, x.dtype)
        if turning.trained:
            ctx.save_for_backward(total, *rest, norm_weight)
            ctx.turning, ctx.added = turning, y is not None
        return total, *parts

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dnormed, dweight, dbias = ctx.turning.backward(grads)
        found = _norm_backward(ctx, dnormed, dtotal)
        ctx.turning.finish()
        return *found, dweight, dbias, None, None, None, None


class _NormMlp(torch.autograd.Function):
    """x + y + bias [N, D], and the MLP of its norm without the last bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        added: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        inside: fp8_mlp.Inside,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        norm, to = (norm_weight, norm_bias, eps), inside.quantizers[0][INPUT]
        total, low, rest = _normed(x, y, added, norm, to, inside.trained)
        if inside.trained:
            ctx.save_for_backward(total, *rest, norm_weight)
            ctx.inside, ctx.added = inside, True
        return total, inside.forward(low, b1, x.dtype)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        dnormed, *found = ctx.inside.backward(dy)
        return *_norm_backward(ctx, dnormed, dtotal), *found, None, None
