"""What torch.compile's default heuristics get wrong for our shapes, measured on an H100.

Rows of 1,408 values are just beyond the width up to which inductor keeps a row in registers: a norm then
reads it three times (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

WIDEST_ROW = 2048  # values that are kept in registers


class Choices(InductorChoices):
    """inductor's heuristics with ours in one place; correctness does not depend on it."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        inner = features.get_reduction_hint() == ReductionHint.INNER
        if inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST_ROW):
            return torch._inductor.config.triton.persistent_reductions
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def install() -> None:
    """Use these choices in what this thread compiles from now on: forward passes (backward ones compile in
    autograd's thread, and their norms are not concerned)."""
    if not isinstance(V.choices, Choices):
        V.set_choices_handler(Choices())
