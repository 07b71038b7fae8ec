"""A layer of the predictor in FP8 with `delayed` scales in training, as fp8_layer.py has the encoder's.

    norms       write the inputs of the queries' linear and of the MLP in both directions
    rotation    going back, the gradients of queries and of keys and values in both directions, with the
                biases'

The queries' linear of the first layer is the first of a pass: its backward pass, the last of all, renews the
scales of gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextvid_mcore.models import carried, fp8_layer, fp8_mlp
from nextvid_mcore.models.fp8_layer import NormTurn, Turning
from nextvid_mcore.models.fp8_products import INPUT

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nextvid_mcore.models.attention import AttentionPattern
    from nextvid_mcore.models.layers import ContextLayer


def fits(config: TransformerConfig, x: Tensor) -> bool:
    """Whether a layer of `config` goes this way with the input `x`."""
    return fp8_layer.on("predictor") and torch.is_grad_enabled() and fp8_mlp.fits(config, x)


def layer(
    module: ContextLayer,
    x: Tensor,
    context: Tensor,
    ropes: tuple[Tensor, Tensor],
    pattern: AttentionPattern | None,
) -> Tensor:
    """What ContextLayer does to queries x [s, rows, E], which read the context [keys, rows, E]."""
    attention, norm = module.cross_attention, module.pre_cross_attn_layernorm
    (y, bias), eps = carried.pending(module) or (None, None), module.config.layernorm_epsilon
    flat, y = x.flatten(0, 1), None if y is None else y.flatten(0, 1)
    (query_cos, query_sin), key_turns = (rope.flatten(1, 2) for rope in ropes)
    linear, turning = attention.linear_q, Turning.of(attention, "q", flat)
    flat, q = NormTurn.apply(
        flat, y, bias, norm.weight, norm.bias, linear.weight, linear.bias, query_cos, query_sin, turning, eps
    )
    linear, read = attention.linear_kv, context.flatten(0, 1)
    k, v = _Keys.apply(read, linear.weight, linear.bias, *key_turns, Turning.of(attention, "kv", read))
    k, v = (part.unflatten(0, context.shape[:2]) for part in (k, v))
    y, bias = attention.linear_proj(attention.attend(q.unflatten(0, x.shape[:2]), k, v, pattern))
    return fp8_layer.mlp_half(module, flat.view(x.shape), y, bias)


class _Keys(torch.autograd.Function):
    """The context [N, E] -> keys, turned, and values [N, A, d]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, turning: Turning
    ) -> tuple[Tensor, ...]:
        ctx.turning, to = turning, turning.quantizers[INPUT]
        to.set_usage(rowwise=True, columnwise=True)
        return tuple(turning.forward(to(x.contiguous()), bias, cos, sin, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.turning.backward(grads), None, None, None
