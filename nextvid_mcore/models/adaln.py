"""AdaLN-zero: DiT's way of telling a layer the timestep tau (Table 7, "Timestep Condition").

The layers differ in what their attention reads. tau and the prediction z come to them as one tensor,
which takes megatron-core's `context` argument: `join` puts tau's vector before the tokens of z.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nextvid_mcore.models import again, carried, fused
from nextvid_mcore.models.fused import Added
from nextvid_mcore.models.norm import mark_sequence_parallel


def join(condition: Tensor, z: Tensor) -> Tensor:
    """tau's vector [1, rows, E] and z [n (/ tp), rows, E] as one tensor: recomputation follows no tuples."""
    return torch.cat([condition, z])


def _norm_again(*args: Any) -> Tensor:
    return fused.gated_norm(*args)[1]


class Modulation(torch.nn.Linear):
    """SiLU, then a linear map of the condition to `parts` vectors of width E; zero at the start."""

    def __init__(self, config: TransformerConfig, parts: int) -> None:
        super().__init__(config.hidden_size, parts * config.hidden_size, dtype=config.params_dtype)
        self.parts = parts
        mark_sequence_parallel(self, config)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [1, rows, E] -> `parts` tensors [1, rows, E]."""
        return super().forward(F.silu(condition)).chunk(self.parts, dim=-1)


class AdaLNLayer(carried.Carries, TransformerLayer):
    """A DiT layer: shift, scale and gate round self-attention and MLP come from tau's vector.

    There is one such vector a row, since a row is one frame at one tau.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adaln = Modulation(self.config, 6)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [s, rows, E] and context, tau's vector [1, rows, E] or `join`ed -> the same two."""
        before = carried.pending(self)  # first: if memory is full below, it goes with the pass
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(context[:1])
        hidden_states, x = self.normed(hidden_states, before, shift1, scale1)
        y, bias = self.attend(x, context[1:], rotary_pos_emb)
        hidden_states, x = self.normed(hidden_states, Added(y, bias, gate1), shift2, scale2)
        y, bias = self.mlp(x)
        return carried.leave(self, hidden_states, Added(y, bias, gate2), fused.gated_add), context

    def normed(self, x: Tensor, added: Added | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """`fused.gated_norm` of the tokens."""
        eps = self.config.layernorm_epsilon
        x, normed = fused.gated_norm(x, added, shift, scale, eps)
        given = x, None, shift, scale, eps
        return x, again.made(self.config, normed, _norm_again, *given)

    def attend(
        self, x: Tensor, z: Tensor, rotary_pos_emb: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The frame's tokens among themselves; z came in with them."""
        return self.self_attention(x, rotary_pos_emb=rotary_pos_emb)


class CrossAdaLNLayer(AdaLNLayer):
    """Noisy tokens attend to z of their frame, and not to each other (Table 5, "Cross Attention")."""

    def attend(self, x: Tensor, z: Tensor, rotary_pos_emb: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.cross_attention(x, key_value_states=self.keys(x, z), rotary_pos_emb=rotary_pos_emb)

    def keys(self, x: Tensor, z: Tensor) -> Tensor:
        """What is attended to, [keys (/ tp), rows, E]."""
        return z


class CrossSelfAdaLNLayer(CrossAdaLNLayer):
    """They attend to z and to each other, in one attention with the same weights (Table 5)."""

    def keys(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([z, x])
