"""An encoder layer in FP8 with `delayed` scales where no gradient is wanted: its norms write FP8 too.

So runs the reference, which sees twice the student's tokens. Its linears read one direction of their inputs,
the one in which a norm has its rows; Transformer Engine's linear takes an input that is already quantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextvid_mcore.models import fp8_mlp, fused

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from nextvid_mcore.models.attention import AttentionPattern


def fits(config: TransformerConfig, x: Tensor) -> bool:
    """Whether a layer of `config` goes this way with the input `x`."""
    return not torch.is_grad_enabled() and fp8_mlp.fits(config, x)


def encoder_layer(
    layer: TransformerLayer, x: Tensor, rope: Tensor | None, pattern: AttentionPattern | None
) -> Tensor:
    """What EncoderLayer does: x [s, rows, D] -> the same shape."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    qkv = layer.self_attention.linear_qkv
    _, low = _norm(x, None, layer.input_layernorm, layer.config, qkv)
    normed = Float8Tensor(
        shape=x.shape,
        dtype=x.dtype,
        data=low._data.view(x.shape),
        fp8_scale_inv=low._scale_inv,
        fp8_dtype=low._fp8_dtype,
        quantizer=low._quantizer,
        device=x.device,
    )
    attended = layer.self_attention(normed, rotary_pos_emb=rope, attention_bias=pattern)
    x, low = _norm(x, attended, layer.pre_mlp_layernorm, layer.config, layer.mlp.linear_fc1)
    return fused.add(x, *fp8_mlp.mlp(layer.mlp, x, low))


def _norm(
    x: Tensor,
    added: tuple[Tensor, Tensor] | None,
    module: torch.nn.Module,
    config: TransformerConfig,
    linear: Any,
) -> tuple[Tensor, Any]:
    """x, with `added` (a linear's output and its bias), and the norm of it as `linear` would quantise it."""
    from nextvid_mcore.models import triton_fp8

    linear.prepare_forward(x)
    to = linear._get_quantizers(False, False, False)[fp8_mlp.INPUT]
    linear.end_forward()
    y, bias = (None, None) if added is None else (added[0].flatten(0, 1), added[1])
    total, scaled = triton_fp8.norm(
        x.flatten(0, 1), y, bias, module.weight, module.bias, config.layernorm_epsilon,
        to.scale, to.amax, fp8_mlp.torch_dtype(to),
    )  # fmt: skip
    return total.view(x.shape), fp8_mlp.as_te(scaled, to, x.dtype)
