"""What torch.compile's default choices get wrong for our shapes, measured on an H100 (benchmarks/RESULTS.md).

Norms: rows of 1,408 values are just beyond the width up to which inductor keeps a row in registers; a norm
then reads it three times. FlexAttention's backward pass: inductor looks whether its own tiles fit a pattern's
blocks, though the call brings others, and finds none for blocks of 64. Gradients: they are expected to be
contiguous and copied where they are not; attention's have the strides of its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.template_heuristics.triton import FlexBwDConfig
from torch._inductor.virtualized import V

from nextvid_mcore.models import kernels

WIDEST_ROW = 2048  # values that are kept in registers


class Choices(InductorChoices):
    """inductor's heuristics with ours in two places; correctness does not depend on them."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        inner = features.get_reduction_hint() == ReductionHint.INNER
        if inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST_ROW):
            return config.triton.persistent_reductions
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def get_flex_attention_bwd_configs(
        self, head_dim: int, dtype: torch.dtype, device_type: str | None = "cuda"
    ) -> list[Any]:
        ours = None if config.max_autotune else kernels.tiles(torch.device("cuda"))
        if ours is None:
            return super().get_flex_attention_bwd_configs(head_dim, dtype, device_type)
        names = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "num_stages", "num_warps")
        return [FlexBwDConfig(*(ours[name] for name in names))]


def install() -> None:
    """Use these choices in what is compiled from now on, in this thread and (backward passes) in others."""
    config.inductor_choices_class = Choices
    if not isinstance(V.choices, Choices):
        V.set_choices_handler(Choices())
    torch._functorch.config.guess_tangent_strides_as_outputs = True
