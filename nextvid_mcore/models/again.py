"""`recompute pieces`: outputs of norms, GELUs and AdaLN's modulations are made again in the backward pass.

They are inputs of linears, which keep them for their weights' gradients, though what they are made of is kept
anyhow. To make them again takes the time of the pieces' forward pass and no matrix product; nothing random is
drawn, so passes are recorded as without it. In FP8 a linear keeps its input in FP8 instead, which stays, but
for what GELU writes itself (models/fp8_mlp.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def wanted(config: TransformerConfig) -> bool:
    """Whether a network of `config` is to do so (models/specs.py)."""
    return getattr(config, "recompute_pieces", False)


def made(config: TransformerConfig, x: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """x, which is function(*args): a linear that is called by `through` keeps these in its place."""
    if wanted(config) and torch.is_grad_enabled():
        given = (each.detach() if isinstance(each, Tensor) else each for each in args)
        x.make_again = functools.partial(function, *given)
    return x


def through(linear: Callable[[Tensor], Any], x: Tensor) -> Any:
    """linear(x), which keeps what x is `made` of, if that is known."""
    make = getattr(x, "make_again", None)
    if make is None:
        return linear(x)
    where, size, dtype = x.data_ptr(), x.numel(), x.dtype

    def keep(saved: Tensor) -> Any:
        is_x = saved.dtype == dtype and saved.numel() == size and saved.data_ptr() == where
        return (make, saved.shape) if is_x and saved.is_contiguous() else saved

    def give(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, shape = kept
        with torch.no_grad():
            return make().reshape(shape)

    with saved_tensors_hooks(keep, give):
        return linear(x)
