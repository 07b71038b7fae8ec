"""The local backend's LayerNorm, torch's or apex's, and the mark for gradients of a sequence's share.

NVIDIA apex is not on the package index (`apex` there is another project, which is never taken for it).
Where it is installed, megatron-core finds its FusedAdam by itself; its LayerNorm is chosen here.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM, FusedLayerNorm
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


class ApexLayerNorm(FusedLayerNorm):
    """megatron-core's wrapper round apex's fused LayerNorm, with parameters of the model's dtype.

    The wrapper marks them for sequence parallelism itself.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size, eps)
        self.to(config.params_dtype)


def local_norm() -> type[torch.nn.Module]:
    """apex's norm on CUDA where apex is installed and Transformer Engine is not, else torch's."""
    fused = HAVE_FUSED_LAYER_NORM and not HAVE_TE and torch.cuda.is_available()
    return ApexLayerNorm if fused else LocalLayerNorm


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Say that the gradients of a replicated module come from a rank's share of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel
