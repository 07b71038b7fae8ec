"""The MLP in FP8 with `delayed` scales: GELU writes the second linear's input, its derivative the first's
gradient.

The two linears are Transformer Engine's; their products are called here (models/fp8_products.py), since a
linear of Transformer Engine takes an input that is already quantised, but not a gradient: it would lose the
copy in the other direction. Everything else (other recipes, tensor parallelism, recomputed layers,
`model.compile` off) takes the linears as they are: `FusedMLP`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextvid_mcore.models import again
from nextvid_mcore.models.fp8_products import (
    GRADIENT,
    INPUT,
    as_te,
    for_backward,
    opened,
    product,
    torch_dtype,
    weight,
    weight_gradient,
)

if TYPE_CHECKING:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_config import TransformerConfig

_state = {"on": True}


def use(on: bool) -> None:
    """Whether MLPs that can go this way do so from now on."""
    _state["on"] = on


def meant(config: TransformerConfig) -> bool:
    """Whether MLPs of `config` go this way on a GPU."""
    return (
        _state["on"]
        and config.fp8 is not None
        and config.fp8_recipe == "delayed"
        and config.tensor_model_parallel_size == 1
        and config.recompute_granularity != "full"
    )


def fits(config: TransformerConfig, x: Tensor) -> bool:
    """Whether an MLP of `config` goes this way with the input `x`."""
    return x.is_cuda and meant(config)


def mlp(module: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Linear, bias and exact GELU, linear: x [s, rows, D] -> the same shape, and the bias [D] that is still
    to be added.
    """
    one, two = module.linear_fc1, module.linear_fc2
    flat = x.flatten(0, 1).contiguous()
    inside = Inside.of(module, flat)
    y = _Mlp.apply(flat, one.weight, one.bias, two.weight, inside)
    return y.view(x.shape), two.bias


@dataclass
class Inside:
    """The two linears in one pass, and what its backward pass reads."""

    linears: tuple[Any, Any]
    quantizers: tuple[tuple, tuple]
    trained: bool  # all is quantised in both directions
    remade: bool  # GELU's result is so in the backward pass, with the scale it had
    kept: tuple | None = None

    @classmethod
    def of(cls, module: MLP, x: Tensor) -> Inside:
        linears, trained = (module.linear_fc1, module.linear_fc2), torch.is_grad_enabled()
        quantizers = tuple(opened(linear, x, trained) for linear in linears)
        return cls(linears, quantizers, trained, again.wanted(module.config))

    def forward(self, low_x: Any, b1: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, D] in FP8 -> [N, D]."""
        from nextvid_mcore.models import triton_fp8

        (one, two), (first, second) = self.linears, self.quantizers
        low_w1, low_w2 = weight(one, first, self.trained), weight(two, second, self.trained)
        to, both = second[INPUT], self.trained and not self.remade
        h = product(low_w1, low_x, dtype)
        low_a = as_te(triton_fp8.gelu(h, b1, to.scale, to.amax, torch_dtype(to), both), to, dtype)
        y = product(low_w2, low_a, dtype)
        if self.trained:
            for_backward(one, low_w1, low_x)
            for_backward(two, low_w2, *((low_a,) if both else ()))
            scale = None if both else to.scale.clone()
            self.kept = h, b1, low_x, low_w1, low_a if both else None, low_w2, scale
        return y

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (in its own precision), the first weight, its bias and the second weight."""
        from nextvid_mcore.models import triton_fp8

        (one, two), (first, second) = self.linears, self.quantizers
        h, b1, low_x, low_w1, low_a, low_w2, scale = self.kept
        self.kept, given, to, of = None, second[INPUT], first[GRADIENT], second[GRADIENT]
        of.set_usage(rowwise=True, columnwise=True)
        low_dy = of(dy.contiguous())
        if low_a is None:
            seen = torch.zeros_like(given.amax)  # it has been told
            low_a = triton_fp8.gelu(h, b1, scale, seen, torch_dtype(given), columns=True, rows=False)
            low_a = as_te(low_a, given, h.dtype)
        dw2 = weight_gradient(two, low_a, low_dy)
        del low_a
        da = product(low_w2, low_dy, h.dtype, layout="NN", grad=True)
        del low_dy
        scaled, db1 = triton_fp8.gelu_backward(da, h, b1, to.scale, to.amax, torch_dtype(to))
        low_dh = as_te(scaled, to, h.dtype)
        dx = product(low_w1, low_dh, h.dtype, layout="NN", grad=True)
        return dx, weight_gradient(one, low_x, low_dh), db1, dw2


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, inside: Inside) -> Tensor:
        to, ctx.inside = inside.quantizers[0][INPUT], inside
        to.set_usage(rowwise=True, columnwise=inside.trained)
        return inside.forward(to(x), b1, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.inside.backward(dy), None
