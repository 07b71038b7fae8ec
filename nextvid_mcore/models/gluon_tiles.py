"""What the Gluon kernels of attention share: copies of tiles, by TMA and back, and their barriers' end."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def load(of, first, column, ready, to, wanted):
    mbarrier.expect(ready, of.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(of, [first, column], ready, to, pred=wanted)


@gluon.jit
def load_both(a, b, first, a_column, b_column, ready, a_to, b_to, wanted):
    mbarrier.expect(ready, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(a, [first, a_column], ready, a_to, pred=wanted)
    tma.async_copy_global_to_shared(b, [first, b_column], ready, b_to, pred=wanted)


@gluon.jit
def invalidate(ready, N: gl.constexpr):
    """At a kernel's end: until then no other buffer gets the barriers' memory, which PTX forbids."""
    for i in gl.static_range(N):
        mbarrier.invalidate(ready.index(i))


@gluon.jit
def store(x, out, first, stop, head, heads, D: gl.constexpr, N: gl.constexpr, W: gl.constexpr):
    """Rows [first, stop) of a head of out [tokens, heads, D] from x [N, D]."""
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [4 * 64 // D, D // 8], [W, 1], [1, 0])
    x = gl.convert_layout(x.to(out.dtype.element_ty), stored)
    tokens = (first + gl.arange(0, N, gl.SliceLayout(1, stored)))[:, None]
    c = gl.arange(0, D, gl.SliceLayout(0, stored))[None, :]
    gl.store(out + (tokens.to(gl.int64) * heads + head) * D + c, x, mask=tokens < stop)


def packed(x: Tensor) -> bool:
    """Whether the heads of all rows lie at equal distances: [rows, A, s, d] on memory [s, rows, A, ...]."""
    rows, heads = x.stride(0), x.stride(1)
    return x.stride(3) == 1 and rows == x.shape[1] * heads and heads % 8 == 0 and x.data_ptr() % 16 == 0


def copied(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def empty(like: Tensor) -> Tensor:
    rows, heads, s, d = like.shape
    return torch.empty(s, rows, heads, d, dtype=like.dtype, device=like.device).permute(1, 2, 0, 3)


def described(tokens: int, *parts: Tensor) -> list[TensorDescriptor]:
    """For copies of `tokens` tokens of a head."""
    rows, heads, _, d = parts[0].shape
    kind = gl.bfloat16 if parts[0].dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([tokens, d], kind)

    def described(x: Tensor) -> TensorDescriptor:
        width = (rows * heads - 1) * x.stride(1) + d  # as far as this one of packed q, k, v goes
        return TensorDescriptor(x, [x.shape[2], width], [x.stride(2), 1], [tokens, d], layout)

    return [described(x) for x in parts]
