"""torch's LayerNorm as megatron-core builds norms, and the mark for gradients of a sequence's share."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm as megatron-core builds norms, allowed under sequence parallelism.

    Its parameters' gradients come from a rank's share of the sequence; the mark tells
    finalize_model_grads to sum them over the tensor group. (megatron-core's own wrapper round
    torch's norm refuses sequence parallelism.)
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Say that the gradients of a replicated module come from a rank's share of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel
