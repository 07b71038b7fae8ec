"""What torch.compile's default heuristics get wrong for our shapes, measured on an H100 (benchmarks/RESULTS.md).

Rows of 1,408 values are just beyond the width up to which inductor keeps a row in registers: a norm then
reads it three times. And FlexAttention's default tiles for heads of 64 suit long rows; ours are stretches of
48 to 256 tokens a frame.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.template_heuristics.triton import FlexBwDConfig, FlexConfig
from torch._inductor.virtualized import V

WIDEST_ROW = 2048  # values that are kept in registers


class Choices(InductorChoices):
    """inductor's heuristics with ours in three places; correctness does not depend on them."""

    def get_flex_attention_fwd_configs(
        self, head_dim: int, dtype: torch.dtype, device_type: str | None = "cuda"
    ) -> list[Any]:
        if dtype == torch.float32:
            return super().get_flex_attention_fwd_configs(head_dim, dtype, device_type)
        return [FlexConfig(64, 64, 3, 4)]

    def get_flex_attention_bwd_configs(
        self, head_dim: int, dtype: torch.dtype, device_type: str | None = "cuda"
    ) -> list[Any]:
        if dtype == torch.float32:
            return super().get_flex_attention_bwd_configs(head_dim, dtype, device_type)
        return [FlexBwDConfig(32, 64, 64, 32, 3, 4)]

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        inner = features.get_reduction_hint() == ReductionHint.INNER
        if inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST_ROW):
            return torch._inductor.config.triton.persistent_reductions
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


@functools.cache
def install() -> None:
    """Use these choices in whatever this process compiles from now on."""
    V.set_choices_handler(Choices())
