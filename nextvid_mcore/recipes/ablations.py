"""A recipe per row of the paper's ablation tables (Tables 2 to 5, 11 and 12), and each row's switches.

`ablate(config, row)` applies a row to any run; the recipes apply it to ViT-L and stop early, after 15K
steps of the full schedule (Section 4.4; 30K for the lower half of Table 11).

Tables 4 and 5 start from Table 2's second row (`table2_gen_ciso`: no alignment), the others from the full
model. Several rows are one run under two names, as their equal numbers in the paper say: the full model
is `table2_full`, `table3_va_vae`, `table11_tau4` and `table12_ema`. Table 5 prints `cross` with the numbers
of Table 2's second row, which hints that this row had that decoder; here it has the paper's `concat`.
Table 3's SigLIP2 and Cosmos VAE need --target.checkpoint already for a dry run: their files say how many
values a token has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.recipes.paper import vit_l


@dataclass(frozen=True)
class Row:
    """What a row of a table sets: fields of the parts of RunConfig, and tau samples of every stage."""

    says: str
    steps: int = 15_000  # where the ViT-L recipe stops
    model: Mapping[str, Any] = field(default_factory=dict)
    mask: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    tau_samples: int | None = None


NO_ALIGN = {"align": False}  # Table 2's second row, on which Tables 4 and 5 build

ROWS: dict[str, Row] = {
    "table2_gen": Row("Generation alone", model=NO_ALIGN | {"context": "joint"}),
    "table2_gen_ciso": Row("Generation with context isolation", model=NO_ALIGN),
    "table2_align": Row("Alignment alone", model={"generate": False, "context": "joint"}),
    "table2_align_ciso": Row("Alignment with context isolation", model={"generate": False}),
    "table2_full": Row("Generation, alignment and context isolation: the full model"),
    "table3_pixels": Row("The full model generates pixels", target={"kind": "pixels"}),
    "table3_siglip2": Row("The full model generates SigLIP2 features", target={"kind": "siglip2"}),
    "table3_cosmos": Row("The full model generates Cosmos VAE latents", target={"kind": "cosmos"}),
    "table3_va_vae": Row("The full model generates VA-VAE latents", target={"kind": "va_vae"}),
    "table4_no_mask": Row(
        "Generation with context isolation, nothing masked", model=NO_ALIGN, mask={"mode": "none"}
    ),
    "table4_mask": Row("Generation with context isolation, masked", model=NO_ALIGN),
    "table5_cross_self": Row(
        "Noisy tokens attend to the condition and to each other", model=NO_ALIGN | {"condition": "cross_self"}
    ),
    "table5_cross": Row("Noisy tokens attend to the condition only", model=NO_ALIGN | {"condition": "cross"}),
    "table11_tau1": Row("One tau a sample, 15K steps", tau_samples=1),
    "table11_tau4": Row("Four tau a sample, 15K steps", tau_samples=4),
    "table11_tau1_30k": Row("One tau a sample, 30K steps", steps=30_000, tau_samples=1),
    "table11_tau4_30k": Row("Four tau a sample, 30K steps", steps=30_000, tau_samples=4),
    "table12_no_ema": Row("The reference is the student itself", optim={"ema": 0.0}),
    "table12_ema": Row("The reference is the student's EMA"),
}


def ablate(config: RunConfig, row: str) -> RunConfig:
    """`config` with the switches of `row`, named after both; its schedule's length is left alone."""
    if row not in ROWS:
        raise ConfigError(f"no ablation {row!r}; there are {', '.join(ROWS)}")
    it = ROWS[row]
    stages = config.stages
    if it.tau_samples is not None:
        stages = tuple(dataclasses.replace(stage, tau_samples=it.tau_samples) for stage in stages)
    return config.altered(
        recipe=f"{config.recipe}_{row}",
        stages=stages,
        model=it.model,
        mask=it.mask,
        target=it.target,
        optim=it.optim,
    )


def _recipe(name: str) -> Callable[[], RunConfig]:
    def make() -> RunConfig:
        return ablate(vit_l(), name).altered(recipe=name, train={"steps": ROWS[name].steps})

    make.__name__ = name
    make.__doc__ = f"ablation of vit_l, {ROWS[name].steps // 1000}K steps: {ROWS[name].says}."
    return make


RECIPES = {name: _recipe(name) for name in ROWS}
