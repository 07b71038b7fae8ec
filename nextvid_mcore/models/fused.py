"""The elementwise work between matrix products, each piece a function that is one kernel on a GPU.

There these pieces only move memory, so a chain of them costs as many passes as it has operations. Called on
CUDA tensors a function here runs compiled, by torch.compile or, where that makes several kernels of it, from
models/triton_pieces.py and triton_adaln.py; on a CPU, and inside `eager()`, it runs as it is written: that is
the reference. The number of tokens (or rows) is left open in the compiled code, so ragged masks and longer
clips compile nothing again; widths are constants of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from nextvid_mcore import switches
from nextvid_mcore.data.transforms import normalize

_state = {"compile": True}
VARIANTS = 64  # compiled forms of one function: widths x precisions x with and without gradient


def use(compile: bool) -> None:
    """Whether CUDA tensors take the compiled form from now on."""
    _state["compile"] = compile


def compiles(x: Tensor) -> bool:
    """Whether work on `x` is compiled."""
    return x.is_cuda and _state["compile"]


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Everything inside runs uncompiled."""
    before = _state["compile"]
    use(False)
    try:
        yield
    finally:
        use(before)


def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with our choices, for a function that few shapes are given to."""
    from nextvid_mcore.models import inductor  # torch's compiler is slow to import

    inductor.install()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, dynamic=False, fullgraph=True)


def fuse(open_dim: int) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorator: compile on CUDA; the first argument's `open_dim` may change without compiling again."""

    def decorate(function: Callable[..., object]) -> Callable[..., object]:
        @functools.cache
        def compiled() -> Callable[..., object]:
            return compile_(function)

        @functools.wraps(function)
        def call(*args: object) -> object:
            if not compiles(args[0]):
                return function(*args)
            size = args[0].shape[open_dim]
            for x in args:
                if isinstance(x, Tensor) and x.dim() > 1 and x.shape[open_dim] == size:
                    torch._dynamo.maybe_mark_dynamic(x, open_dim)
            return compiled()(*args)

        call.compiled = compiled
        return call

    return decorate


@fuse(open_dim=0)
def _pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    return normalize(x).to(dtype).flatten(1)


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, ...], wherever it lies in memory, as values in [-1, 1] (data/transforms.py), contiguous."""
    if compiles(x) and switches.on("pixels"):
        return _pixels(x, dtype).view(x.shape)
    return normalize(x.contiguous()).to(dtype)


@fuse(open_dim=0)
def _add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return x + (y + bias)


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias: residual, output of a linear, and that linear's bias; [s, rows, D]."""
    return _add(x.flatten(0, 1), y.flatten(0, 1), bias).view(x.shape)


@fuse(open_dim=0)
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


@fuse(open_dim=0)
def _add_norm(
    x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x + (y + bias)
    return x, *torch.native_layer_norm(x, x.shape[-1:], weight, norm_bias, eps)


class _Norm(torch.autograd.Function):
    """x [N, D] itself and its norm: both gradients meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, mean, rstd = _norm(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return x, normed

    @staticmethod
    def backward(ctx: Any, dpast: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        return *_triton().norm_backward(dnormed, dpast, *ctx.saved_tensors, linear=False), None


class _AddNorm(torch.autograd.Function):
    """x + y + bias [N, D], and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, mean, rstd = _add_norm(x, y, bias, weight, norm_bias, eps)
        ctx.save_for_backward(total, mean, rstd, weight)
        return total, normed

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx, dweight, dnorm_bias, dbias = _triton().norm_backward(dnormed, dtotal, *saved, linear=True)
        return dx, dx, dbias, dweight, dnorm_bias, None


def norm(x: Tensor, module: Module, eps: float) -> tuple[Tensor, Tensor]:
    """x [s, rows, D], for what goes on past the norm, and `module` of it: a LayerNorm with weight and bias.

    Not compiled, the norm is the module's own kernel.
    """
    if not compiles(x):
        return x, module(x)
    past, normed = _Norm.apply(x.flatten(0, 1), module.weight, module.bias, eps)
    return past.view(x.shape), normed.view(x.shape)


def add_norm(x: Tensor, y: Tensor, bias: Tensor, module: Module, eps: float) -> tuple[Tensor, Tensor]:
    """x + y + bias, and `module` of it."""
    if not compiles(x):
        x = add(x, y, bias)
        return x, module(x)
    total, normed = _AddNorm.apply(x.flatten(0, 1), y.flatten(0, 1), bias, module.weight, module.bias, eps)
    return total.view(x.shape), normed.view(x.shape)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias; x: [s, rows, width]."""
    if not compiles(x):
        return F.gelu(x + bias)
    return _triton().BiasGelu.apply(x.flatten(0, 1), bias).view(x.shape)


@fuse(open_dim=1)
def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, then x * (1 + scale) + shift. x: [s, rows, E], others [1, rows, E]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@fuse(open_dim=1)
def gated_add(x: Tensor, y: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """x + gate * (y + bias); x and y: [s, rows, E], gate [1, rows, E]."""
    return x + gate * (y + bias)


class Added(NamedTuple):
    """What `gated_add` adds: a linear's output and bias, and the gate of both."""

    y: Tensor
    bias: Tensor
    gate: Tensor


def gated_norm(
    x: Tensor, added: Added | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x with `added`, and `modulate` of it; our kernels are for tokens that are not too wide for them."""
    if compiles(x) and switches.on("gated_norm"):
        kernels = _triton("triton_adaln")
        if kernels.fits(x):
            return kernels.GatedNorm.apply(x, *(added or (None,) * 3), shift, scale, eps)
    if added is not None:
        x = gated_add(x, *added)
    return x, modulate(x, shift, scale, eps)


@fuse(open_dim=2)
def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean over D of (x - y)^2 in fp32; x [n, M, rows, D], y [n, 1, rows, D] the same for every M."""
    return (x.float() - y).square().mean(-1)


@fuse(open_dim=2)
def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x.float(), y.float(), dim=-1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Over D in fp32; x [n, M, ..., D], y [n, 1, ..., D] the same for every M."""
    if x.dim() < 4 or not switches.on("monitors"):
        return F.cosine_similarity(x.float(), y.float(), dim=-1)
    return _cosine(x.flatten(2, -2), y.flatten(2, -2)).view(x.shape[:-1])


def moments(x: Tensor) -> Tensor:
    """Of shares of x's rows [N, W], which are read once: fp32 [shares, 1 + 2 W].

    A share's count, and its channels' means and sums of squared deviations.
    """
    if compiles(x) and switches.on("monitors"):
        return _triton().moments(x)
    x = x.float()
    mean = x.mean(0)
    return torch.cat([torch.full_like(mean[:1], len(x)), mean, (x - mean).square().sum(0)])[None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of heads [..., A, d]; cos and sin: fp32 [..., 1, R / 2]."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def rotate_heads(parts: int, packed: Tensor, heads: int, rope: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values out of a linear's output, queries and keys turned by their positions.

    Args:
        parts: 3 for [q, k, v] of each head, 2 for [k, v], 1 for q alone.
        packed: [s, rows, heads * parts * d], as megatron-core's linears have it, which keep nothing of it:
            compiled, it is turned in place.
        rope: `rope.turns` of the tokens, [2, s, rows, R / 2].

    Returns:
        `parts` tensors [s, rows, heads, d]; compiled, views of `packed`.
    """
    s, rows = packed.shape[:2]
    if compiles(packed):
        flat = packed.reshape(s * rows, -1)
        found = _triton().Turn.apply(flat, *rope.flatten(1, 2), heads, parts)
        return tuple(x.unflatten(0, (s, rows)) for x in found)
    cos, sin = rope.unsqueeze(3)
    *turned, last = packed.view(s, rows, heads, parts, -1).unbind(3)
    turned = [_rotate(x, cos, sin) for x in turned]
    return (*turned, last) if parts > 1 else (_rotate(last, cos, sin),)


def _triton(name: str = "triton_pieces") -> ModuleType:
    return importlib.import_module(
        f"nextvid_mcore.models.{name}"
    )  # needs CUDA's compiler, and time to import
