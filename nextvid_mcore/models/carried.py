"""A layer's last addition, left to the next layer's norm, which reads the residual stream anyhow.

What is still to be added, the output of a layer's MLP and the bias, waits in a `Link` between the two layers
and not with the stream itself, of which a module's hook may hand on a copy. The last layer of a block adds it
up (the decoder's leaves it to the norm after the block), and so does every layer where its output alone is
kept for the backward pass (`recompute full`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module

from nextvid_mcore.models import fused

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

Added = tuple[Tensor, ...]  # a linear's output, that linear's bias, and in the decoder a gate (fused.Added)


class Link:
    """Between a layer and the next."""

    def __init__(self) -> None:
        self.added: Added | None = None

    def take(self) -> Added | None:
        added, self.added = self.added, None
        return added


class Carries:
    """Of a layer, what lies before it and behind it; None at the ends of a block."""

    before: Link | None = None
    behind: Link | None = None


def link(layers: Iterable[Module]) -> None:
    """Join the layers of a block, in their order, if they are of a kind that carries."""
    for one, two in itertools.pairwise(layers):
        if isinstance(one, Carries) and isinstance(two, Carries):
            one.behind = two.before = Link()


def pending(layer: Carries) -> Added | None:
    """What is still to be added to the stream that `layer` was given."""
    return None if layer.before is None else layer.before.take()


def left(layer: TransformerLayer, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The stream x as `layer` gives it, to which y + bias belong."""
    return leave(layer, x, (y, bias), fused.add)


def leave(layer: TransformerLayer, x: Tensor, added: Added, add: Callable[..., Tensor]) -> Tensor:
    """The stream x as `layer` gives it, to which `added` belongs; `add` does it where it may not wait."""
    if layer.behind is None or layer.config.recompute_granularity == "full":
        return add(x, *added)
    layer.behind.added = added
    return x
