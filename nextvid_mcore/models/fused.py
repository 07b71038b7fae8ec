"""The elementwise work between matrix products, each piece a function that torch.compile makes one kernel.

On a GPU these pieces only move memory, so a chain of them costs as many passes as it has operations.
Called on CUDA tensors a function here runs compiled; on a CPU, and inside `eager()`, the same function runs
as it is written: that is the reference. The number of tokens (or rows) is left open in the compiled code, so
ragged masks and longer clips compile nothing again; widths are constants of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

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
def _add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return x + (y + bias)


@fuse(open_dim=0)
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias: residual, output of a linear, and that linear's bias; [s, rows, D]."""
    return _add(x.flatten(0, 1), y.flatten(0, 1), bias).view(x.shape)


@fuse(open_dim=0)
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@fuse(open_dim=0)
def _add_norm(
    x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x + (y + bias)
    return x, F.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)


def norm(x: Tensor, module: Module, eps: float) -> Tensor:
    """`module`, a LayerNorm with weight and bias, on [s, rows, D]; not compiled, the module's own kernel."""
    if not compiles(x):
        return module(x)
    return _norm(x.flatten(0, 1), module.weight, module.bias, eps).view(x.shape)


def add_norm(x: Tensor, y: Tensor, bias: Tensor, module: Module, eps: float) -> tuple[Tensor, Tensor]:
    """x + y + bias, and `module` of it."""
    if not compiles(x):
        x = add(x, y, bias)
        return x, module(x)
    total, normed = _add_norm(x.flatten(0, 1), y.flatten(0, 1), bias, module.weight, module.bias, eps)
    return total.view(x.shape), normed.view(x.shape)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias; x: [s, rows, width]."""
    return _bias_gelu(x.flatten(0, 1), bias).view(x.shape)


@fuse(open_dim=1)
def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, then x * (1 + scale) + shift. x: [s, rows, E], others [1, rows, E]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@fuse(open_dim=1)
def gated_add(x: Tensor, gate: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + gate * (y + bias); x and y: [s, rows, E], gate [1, rows, E]."""
    return x + gate * (y + bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of heads [N, A, d]; cos and sin: fp32 [N, 1, R / 2]."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


@fuse(open_dim=0)
def _rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, dim=-1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v.contiguous()


@fuse(open_dim=0)
def _rotate_kv(kv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    k, v = kv.chunk(2, dim=-1)
    return _rotate(k, cos, sin), v.contiguous()


@fuse(open_dim=0)
def _rotate_q(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate(q, cos, sin)


def rotate_heads(parts: int, packed: Tensor, heads: int, rope: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values out of a linear's output, queries and keys turned by their positions.

    Args:
        parts: 3 for [q, k, v] of each head, 2 for [k, v], 1 for q alone.
        packed: [s, rows, heads * parts * d], as megatron-core's linears have it.
        rope: `rope.turns` of the tokens, [2, s, rows, R / 2].

    Returns:
        `parts` tensors [s, rows, heads, d] of their own memory, so that `packed` can be freed.
    """
    s, rows = packed.shape[:2]
    cos, sin = rope.flatten(1, 2).unsqueeze(2)
    heads_first = packed.reshape(s * rows, heads, -1)
    found = {1: _rotate_q, 2: _rotate_kv, 3: _rotate_qkv}[parts](heads_first, cos, sin)
    return tuple(x.view(s, rows, heads, -1) for x in (found if isinstance(found, tuple) else (found,)))
