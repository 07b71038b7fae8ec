"""Recipes: functions that return a whole `RunConfig`, by name."""

from __future__ import annotations

from collections.abc import Callable

from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.recipes import ablations, digits, paper, tiny
from nextvid_mcore.recipes.ablations import ablate

__all__ = ["RECIPES", "ablate", "get", "names"]

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny.tiny,
    "vit_l": paper.vit_l,
    "vit_h": paper.vit_h,
    "vit_g": paper.vit_g,
    **digits.RECIPES,
    **ablations.RECIPES,
}


def names() -> list[str]:
    return list(RECIPES)


def get(name: str) -> RunConfig:
    """The recipe called `name`, or a `ConfigError` that lists what there is."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
