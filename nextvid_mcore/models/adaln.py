"""AdaLN-zero: DiT's way of telling a layer the timestep tau (Table 7, "Timestep Condition")."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nextvid_mcore.models.norm import mark_sequence_parallel


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, then x * (1 + scale) + shift. x: [s, rows, E], others [1, rows, E]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Modulation(torch.nn.Linear):
    """SiLU, then a linear map of the condition to `parts` vectors of width E; zero at the start."""

    def __init__(self, config: TransformerConfig, parts: int) -> None:
        super().__init__(config.hidden_size, parts * config.hidden_size, dtype=config.params_dtype)
        self.parts = parts
        mark_sequence_parallel(self, config)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [1, rows, E] -> `parts` tensors [1, rows, E]."""
        return super().forward(F.silu(condition)).chunk(self.parts, dim=-1)


class AdaLNLayer(TransformerLayer):
    """A DiT layer: shift, scale and gate round self-attention and MLP come from the condition.

    The condition takes megatron-core's `context` argument; it is one vector a row, since a row is
    one frame at one tau.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adaln = Modulation(self.config, 6)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [s, rows, E] and the condition [1, rows, E] -> the same two."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(context)
        eps = self.config.layernorm_epsilon
        x = modulate(hidden_states, shift1, scale1, eps)
        y, bias = self.self_attention(x, attention_mask=None, rotary_pos_emb=rotary_pos_emb)
        hidden_states = hidden_states + gate1 * (y + bias)
        y, bias = self.mlp(modulate(hidden_states, shift2, scale2, eps))
        return hidden_states + gate2 * (y + bias), context
