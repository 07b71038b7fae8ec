"""A layer's last addition, left to the next layer's norm, which reads the residual stream anyhow.

A layer gives the stream with what is still to be added, the output of its MLP and the bias, as the attribute
`pending`. The last layer of a block gives the sum, and so does every layer where its output alone is kept
between forward and backward pass (`recompute full`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nextvid_mcore.models import fused

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer


def pending(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the layer before has left to be added to the stream x, and its bias."""
    return getattr(x, "pending", None)


def left(layer: TransformerLayer, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The stream x as `layer` gives it, to which y + bias belong."""
    if layer.last or layer.config.recompute_granularity == "full":
        return fused.add(x, y, bias)
    x.pending = y, bias
    return x
