"""A layer of the decoder in FP8 with `delayed` scales, as models/fp8_layer.py has the encoder's, in training.

    norms       AdaLN's write the inputs of queries-keys-values and of the MLP
    gates       going back, the gradients of the output linear and of the MLP, which are a gate times the
                residual's: the next norm's kernel has them, and hands them on beside autograd
    rotation    going back, the gradient of queries-keys-values, with the bias's

Norms and gates have a row's vectors in registers while they go through its tokens, and lay tokens down one by
one: they write one direction, and Transformer Engine turns it into the other where a weight's gradient reads
it. What writes bf16 and quantises both directions later moves twice as many bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextvid_mcore.models import fp8_layer, fp8_mlp
from nextvid_mcore.models.fp8_layer import Turning
from nextvid_mcore.models.fp8_products import (
    GRADIENT,
    INPUT,
    Gradient,
    as_te,
    for_backward,
    opened,
    product,
    weight,
    weight_gradient,
)
from nextvid_mcore.models.fused import Added

if TYPE_CHECKING:
    from nextvid_mcore.models.adaln import AdaLNLayer


def fits(module: AdaLNLayer, x: Tensor) -> bool:
    """Whether a layer goes this way with the input `x`."""
    if not (fp8_layer.on("decoder") and torch.is_grad_enabled() and fp8_mlp.fits(module.config, x)):
        return False
    from nextvid_mcore.models import triton_adaln

    return module.itself and triton_adaln.fits(x)


def layer(
    module: AdaLNLayer, x: Tensor, added: Added | None, vectors: tuple[Tensor, ...], rope: Tensor
) -> tuple[Tensor, Added]:
    """What AdaLNLayer does to x [s, rows, E] and `added`, and what is then to be added.

    vectors: [1, rows, E], what tau gives the layer.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors
    attention, mlp, eps = module.self_attention, module.mlp, module.config.layernorm_epsilon
    qkv, (one, two) = attention.linear_qkv, (mlp.linear_fc1, mlp.linear_fc2)
    turning = Turning.of(attention, "qkv", x.flatten(0, 1))
    added = added or (None,) * 4
    x, *parts = _Turned.apply(
        x, *added[:3], shift1, scale1, qkv.weight, qkv.bias, *rope.flatten(1, 2), turning, added[3], eps
    )
    parts = (part.unflatten(0, x.shape[:2]) for part in parts)
    added = _projected(attention.linear_proj, attention.attend(*parts, None), gate1)
    inside = fp8_mlp.Inside.of(mlp, x.flatten(0, 1))
    x, y = _Mlp.apply(
        x, *added[:3], shift2, scale2, one.weight, one.bias, two.weight, inside, added.sink, eps
    )
    return x, Added(y, two.bias, gate2, inside.gradient)


def _projected(linear: Any, x: Tensor, gate: Tensor) -> Added:
    """The output linear of attention's x [s, rows, A * d]."""
    quantizers = opened(linear, x, True)
    sink = Gradient(quantizers[GRADIENT])
    return Added(_Linear.apply(x, linear.weight, linear, quantizers, sink), linear.bias, gate, sink)


class _Linear(torch.autograd.Function):
    """x [s, rows, D] -> [s, rows, E], without the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameter: Tensor, linear: Any, quantizers: tuple, sink: Gradient
    ) -> Tensor:
        quantizers[INPUT].set_usage(rowwise=True, columnwise=True)
        low, low_weight = quantizers[INPUT](x.flatten(0, 1).contiguous()), weight(linear, quantizers, True)
        y = product(low_weight, low, x.dtype)
        for_backward(linear, low_weight, low)
        ctx.linear, ctx.sink, ctx.kept = linear, sink, (low, low_weight)
        return y.view(*x.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (low, low_weight), ctx.kept = ctx.kept, None
        low_dy = ctx.sink.take(dy.flatten(0, 1))
        dx = product(low_weight, low_dy, dy.dtype, layout="NN", grad=True)
        return dx.view(*dy.shape[:2], -1), weight_gradient(ctx.linear, low, low_dy), None, None, None


def _normed(ctx: Any, stream: tuple, to: Any, eps: float) -> tuple[Tensor, Any]:
    """x (+ gate * (y + bias)) and, as the quantiser `to` has it, its modulated norm."""
    from nextvid_mcore.models import triton_adaln

    x, y, bias, gate, _, scale = stream
    total, scaled, mean, rstd = triton_adaln.forward(*stream, eps, low=triton_adaln.Quantum.of(to))
    ctx.save_for_backward(total, y, bias, gate, scale, mean, rstd)
    return total, as_te(scaled, to, x.dtype)


def _norm_backward(ctx: Any, dnormed: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, bias, gate, shift and scale."""
    from nextvid_mcore.models import triton_adaln

    return triton_adaln.through(ctx.sink, dnormed.view(dtotal.shape), dtotal, *ctx.saved_tensors)


class _Turned(torch.autograd.Function):
    """x (+ gate * (y + bias)) [s, rows, E]; its norm's queries, keys and values, turned: [N, A, d] each."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        *stream, _, linear_bias, cos, sin, turning, sink, eps = given
        total, low = _normed(ctx, stream, turning.quantizers[INPUT], eps)
        ctx.turning, ctx.sink = turning, sink
        return total, *turning.forward(low, linear_bias, cos, sin, total.dtype)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dnormed, *of_linear = ctx.turning.backward(grads)
        found = _norm_backward(ctx, dnormed, dtotal)
        ctx.turning.finish()
        return *found, *of_linear, None, None, None, None, None


class _Mlp(torch.autograd.Function):
    """x + gate * (y + bias) [s, rows, E], and the MLP of its norm without the last bias."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *stream, _, bias, _, inside, sink, eps = given
        total, low = _normed(ctx, stream, inside.quantizers[0][INPUT], eps)
        ctx.inside, ctx.sink = inside, sink
        return total, inside.forward(low, bias, total.dtype).view(total.shape)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        dnormed, *of_linears = ctx.inside.backward(dy.flatten(0, 1))
        return *_norm_backward(ctx, dnormed, dtotal), *of_linears, None, None, None
