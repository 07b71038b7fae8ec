"""FP8 in the linears of the four networks, recipe by recipe and role by role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextvid_mcore.config.errors import require

Recipe = Literal["none", "current", "delayed", "blockwise", "mxfp8"]
ROLES = ("student", "reference", "predictor", "decoder")


@dataclass(frozen=True)
class Fp8Config:
    """Transformer Engine's recipes: `--fp8.all current --fp8.decoder none`.

    current    one scale a tensor, from the values it has now
    delayed    one scale a tensor, from the values it had in the last passes
    blockwise  a scale for every 128 values (activations) or 128 x 128 (weights)
    mxfp8      a scale for every 32 values; Blackwell only

    Weights stay in the run's precision and are quantised once a step. Attention, norms, patch embedding,
    projections in and out and AdaLN's maps are not touched.
    """

    all: Recipe = "none"  # of every role that has none of its own below
    student: Recipe | None = None
    reference: Recipe | None = None  # it has no gradient
    predictor: Recipe | None = None
    decoder: Recipe | None = None
    format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: gradients are e5m2, all else e4m3
    fused: bool = True  # `delayed`: GELU and what docs/fp8.md names write FP8 themselves; False: to compare
    bf16_first: int = 0  # layers at the start of every network that stay as they are; not with `delayed`
    bf16_last: int = 0  # and at its end

    def __post_init__(self) -> None:
        recipes = set(self.recipes().values())
        for name in ("bf16_first", "bf16_last"):
            value = getattr(self, name)
            require(value >= 0, f"fp8 {name} must be 0 or more layers, got {value}")
            require(
                value == 0 or "delayed" not in recipes,
                f"fp8 {name} {value}: recipe delayed keeps one scope over all layers, so none can stay out; "
                "use another recipe or leave it at 0",
            )

    def of(self, role: str) -> Recipe:
        """The recipe of student, reference, predictor or decoder."""
        return getattr(self, role) or self.all

    def recipes(self) -> dict[str, Recipe]:
        """Recipe by role."""
        return {role: self.of(role) for role in ROLES}

    @property
    def used(self) -> dict[str, Recipe]:
        """Recipe by role, of the roles that run in FP8."""
        return {role: recipe for role, recipe in self.recipes().items() if recipe != "none"}
