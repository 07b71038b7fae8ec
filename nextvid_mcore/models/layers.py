"""The layers of encoder and predictor: megatron-core's, with forward passes that have nothing else to do.

Parameters, names and parallelism are megatron-core's; what stands between its matrix products is one fused
piece each (models/fused.py), and rotary angles come as cosines and sines computed once for all layers.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules, SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module

from nextvid_mcore.models import again, carried, fp8_layer, fp8_mlp, fused
from nextvid_mcore.models.attention import AttentionPattern


class FusedMLP(MLP):
    """Linear, bias and exact GELU in one piece, linear; the last bias is left to the residual's addition."""

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor]:
        """[s (/ tp), rows, D] -> the same shape, and the bias [D] that is still to be added."""
        if fp8_mlp.fits(self.config, hidden_states):
            return fp8_mlp.mlp(self, hidden_states)
        x, bias = again.through(self.linear_fc1, hidden_states)
        x = again.made(self.config, fused.bias_gelu(x, bias), fused.bias_gelu, x, bias)
        return again.through(self.linear_fc2, x)


class _Attend:
    """What both kinds of attention do once queries, keys and values are there."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern | None) -> Tensor:
        """[s, rows, A, d] each -> [s, rows, A * d]; recomputed in the backward pass with `core_attn`."""
        run = self.core_attention
        if self.checkpoint_core_attention and self.training:
            run = self._checkpointed_attention_forward
        return run(q, k, v, None, attn_mask_type=self.attn_mask_type, attention_bias=pattern)


class PatternSelfAttention(_Attend, SelfAttention):
    """megatron-core's self-attention with our rotary positions and patterns."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: AttentionPattern | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [s (/ tp), rows, D], rotary_pos_emb [2, s, rows, R / 2] -> output and its bias."""
        packed, _ = again.through(self.linear_qkv, hidden_states)
        q, k, v = fused.rotate_heads(3, packed, self.num_attention_heads_per_partition, rotary_pos_emb)
        return self.linear_proj(self.attend(q, k, v, attention_bias))


class PatternCrossAttention(_Attend, CrossAttention):
    """The same for cross-attention, whose linears get the tensor group (megatron-core forgets it)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int | None = None,
        **kwargs: Any,
    ) -> None:
        submodules = CrossAttentionSubmodules(
            linear_q=functools.partial(submodules.linear_q, tp_group=pg_collection.tp),
            linear_kv=functools.partial(submodules.linear_kv, tp_group=pg_collection.tp),
            core_attention=submodules.core_attention,
            linear_proj=submodules.linear_proj,
        )
        super().__init__(config, submodules, *args, pg_collection=pg_collection, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        key_value_states: Tensor | None = None,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        attention_bias: AttentionPattern | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [queries, rows, E] read key_value_states [keys, rows, E] -> output and its bias.

        rotary_pos_emb: of queries and of keys.
        """
        heads, (query_rope, key_rope) = self.num_attention_heads_per_partition, rotary_pos_emb
        k, v = fused.rotate_heads(2, self.linear_kv(key_value_states)[0], heads, key_rope)
        (q,) = fused.rotate_heads(1, again.through(self.linear_q, hidden_states)[0], heads, query_rope)
        return self.linear_proj(self.attend(q, k, v, attention_bias))


def norm(
    layer: TransformerLayer, x: Tensor, added: tuple[Tensor, Tensor] | None, module: Module
) -> tuple[Tensor, Tensor]:
    """x with `added`, the output of a linear and its bias, and `module` of it."""
    eps = layer.config.layernorm_epsilon
    x, normed = fused.norm(x, module, eps) if added is None else fused.add_norm(x, *added, module, eps)
    return x, again.made(layer.config, normed, lambda past: fused.norm(past, module, eps)[1], x)


class EncoderLayer(carried.Carries, TransformerLayer):
    """Pre-norm ViT layer."""

    def forward(
        self,
        hidden_states: Tensor,
        context: None = None,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: AttentionPattern | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s (/ tp), rows, D] -> the same, and None."""
        if fp8_layer.fits(self.config, hidden_states):
            return fp8_layer.encoder_layer(self, hidden_states, rotary_pos_emb, attention_bias), None
        before = carried.pending(self)
        hidden_states, normed = norm(self, hidden_states, before, self.input_layernorm)
        attended = self.self_attention(normed, rotary_pos_emb=rotary_pos_emb, attention_bias=attention_bias)
        hidden_states, normed = norm(self, hidden_states, attended, self.pre_mlp_layernorm)
        return carried.left(self, hidden_states, *self.mlp(normed)), None


class ContextLayer(carried.Carries, TransformerLayer):
    """Cross-attention and MLP, no self-attention: queries read a fixed context (Section 3.2).

    The context is key and value of every layer and passes through unchanged.
    """

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        attention_bias: AttentionPattern | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [queries, rows, E] and context [keys, rows, E] -> the same two."""
        before = carried.pending(self)
        hidden_states, normed = norm(self, hidden_states, before, self.pre_cross_attn_layernorm)
        attended = self.cross_attention(
            normed,
            key_value_states=context,
            rotary_pos_emb=rotary_pos_emb,
            attention_bias=attention_bias,
        )
        hidden_states, normed = norm(self, hidden_states, attended, self.pre_mlp_layernorm)
        return carried.left(self, hidden_states, *self.mlp(normed)), context
