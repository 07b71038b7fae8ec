"""models/triton_stairs.py's attention for Hopper, in Gluon: asynchronous products, copies by TMA.

A program is one warpgroup with 64 queries of a head. Forward has FlashAttention-3's overlap (Shah et al.
2024) as models/gluon_prefix.py has it; backward is in models/gluon_backward.py. models/stairs.py says which
blocks a program goes through: first those that all its queries see, then those where limits are asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nextvid_mcore.models import gluon_backward
from nextvid_mcore.models.gluon_tiles import copied, described, empty, invalidate, load, packed, store
from nextvid_mcore.models.stairs import Stairs, limits_on, tiles_on


class Tile(NamedTuple):
    """Queries and keys that are multiplied at once, and the warps that do it."""

    queries: int = 64
    keys: int = 64
    warps: int = 4


FORWARD = QUERY = KEY = Tile()


@gluon.jit
def _next(
    j, last, q_at, k, v, k_at, v_at, k_ready, v_ready, column, first, limit, scale, top, total, found,
    weights,
    BM: gl.constexpr, BN: gl.constexpr, scored: gl.constexpr, summed: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Adds block j's values and computes the weights of block j + 1."""
    weighing: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    here, there = j % 2, (j + 1) % 2
    none = gl.zeros([BM, BN], gl.float32, scored)
    scores = warpgroup_mma(q_at, k_at.index(there).permute((1, 0)), none, use_acc=False, is_async=True)
    found = warpgroup_mma(weights, v_at.index(here), found, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        keys = first + (j + 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, scored))
        scores = gl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    shrink = gl.exp2(top - higher)
    p = gl.exp2(scores * scale - higher[:, None])
    total = total * shrink + gl.sum(p, 1)
    # what the next products read; waited for there, ptxas would move the wait for `found` up as well
    mbarrier.wait(k_ready.index(here), (j // 2 + 1) & 1, pred=j + 1 < last)
    mbarrier.wait(v_ready.index(there), ((j + 1) // 2) & 1)
    found = warpgroup_mma_wait(0, deps=[found])
    gl.thread_barrier()
    load(k, first + (j + 3) * BN, column, k_ready.index(there), k_at.index(there), j + 2 < last)
    load(v, first + (j + 2) * BN, column, v_ready.index(here), v_at.index(here), j + 1 < last)
    found = found * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
    return higher, total, found, gl.convert_layout(p.to(v.dtype), weighing)


@gluon.jit
def _forward(
    q, k, v, out, lse, limits, table, scale, heads, tiles, tokens, q_head, k_head,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BN, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D, 16])
    weighing: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    head, tile = gl.program_id(0) // tiles, table + gl.program_id(0) % tiles * 5
    start, stop, first = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
    whole, last = gl.load(tile + 3), gl.load(tile + 4) - 1
    column = head * k_head

    q_at = gl.allocate_shared_memory(q.dtype, [BM, D], q.layout)
    k_at = gl.allocate_shared_memory(k.dtype, [2, BN, D], k.layout)
    v_at = gl.allocate_shared_memory(v.dtype, [2, BN, D], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()  # copies by TMA must see the barriers as they were made
    load(q, start, head * q_head, q_ready.index(0), q_at, True)
    for i in gl.static_range(2):
        load(k, first + i * BN, column, k_ready.index(i), k_at.index(i), i <= last)
        load(v, first + i * BN, column, v_ready.index(i), v_at.index(i), i <= last)
    rows = start + gl.arange(0, BM, gl.SliceLayout(1, scored))
    limit = gl.load(limits + rows, mask=rows < tokens, other=1 << 30)

    none = gl.zeros([BM, BN], gl.float32, scored)
    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(q_at, k_at.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    gl.thread_barrier()
    load(k, first + 2 * BN, column, k_ready.index(0), k_at.index(0), last > 1)
    keys = first + gl.arange(0, BN, gl.SliceLayout(0, scored))
    scores = gl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    top = gl.max(scores, 1) * scale  # of the scores so far, as exponents of 2; every row sees a key here
    p = gl.exp2(scores * scale - top[:, None])
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(v.dtype), weighing)
    found = gl.zeros([BM, D], gl.float32, summed)
    mbarrier.wait(k_ready.index(1), 0, pred=last > 0)
    mbarrier.wait(v_ready.index(0), 0)
    masked = gl.maximum(whole - 1, 0)
    for j in range(0, masked):
        top, total, found, weights = _next(
            j, last, q_at, k, v, k_at, v_at, k_ready, v_ready, column, first, limit, scale, top, total, found,
            weights, BM, BN, scored, summed, False,
        )  # fmt: skip
    for j in range(masked, last):
        top, total, found, weights = _next(
            j, last, q_at, k, v, k_at, v_at, k_ready, v_ready, column, first, limit, scale, top, total, found,
            weights, BM, BN, scored, summed, True,
        )  # fmt: skip
    found = warpgroup_mma(weights, v_at.index(last % 2), found, is_async=True)
    found = warpgroup_mma_wait(0, deps=[found])
    found = found / gl.convert_layout(total, gl.SliceLayout(1, summed))[:, None]
    gl.store(lse + head.to(gl.int64) * tokens + rows, top + gl.log2(total), mask=rows < stop)
    store(found, out, start, stop, head, heads, D, BM, W)
    invalidate(q_ready, 1)
    invalidate(k_ready, 2)
    invalidate(v_ready, 2)


def _launch(kernel: Any, tile: Tile, table: Tensor, q: Tensor, k: Tensor, *args: object) -> None:
    rows, heads, s, d = q.shape
    kernel[(rows * heads * len(table),)](
        *args, table, math.log2(math.e) / math.sqrt(d), rows * heads, len(table), s, q.stride(1), k.stride(1),
        D=d, BM=tile.queries, BN=tile.keys, W=tile.warps, num_warps=tile.warps,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, stairs: Stairs, tile: Tile = FORWARD) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each query's sum of weights, to base 2: [rows * A, queries]."""
    rows, heads, s, _ = q.shape
    out, lse = empty(q), torch.empty(rows * heads, s, dtype=torch.float32, device=q.device)
    table = tiles_on(stairs, False, tile.queries, tile.keys, q.device)
    parts = *described(tile.queries, q), *described(tile.keys, k, v), out, lse, limits_on(stairs, q.device)
    _launch(_forward, tile, table, q, k, *parts)
    return out, lse


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, stairs: Stairs,
    tile: Tile = QUERY,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, and the sums of out * dout [rows * A, queries]."""
    dq, delta = empty(q), torch.empty_like(lse)
    (q_, dout_), (k_, v_) = described(tile.queries, q, dout), described(tile.keys, k, v)
    table = tiles_on(stairs, False, tile.queries, tile.keys, q.device)
    parts = q_, k_, v_, dout_, out, dq, lse, delta, limits_on(stairs, q.device)
    _launch(gluon_backward.query_gradient, tile, table, q, k, *parts)
    return dq, delta


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, stairs: Stairs,
    tile: Tile = KEY,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv."""
    dk, dv = empty(k), empty(v)
    (q_, dout_), (k_, v_) = described(tile.queries, q, dout), described(tile.keys, k, v)
    table = tiles_on(stairs, True, tile.keys, tile.queries, q.device)
    parts = q_, k_, v_, dout_, lse, delta, dk, dv, limits_on(stairs, q.device)
    _launch(gluon_backward.key_gradients, tile, table, q, k, *parts)
    return dk, dv


class Attention(torch.autograd.Function):
    """[rows, A, queries, d] on memory [queries, rows, A, d]; gradients lie so too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, stairs: Stairs) -> Tensor:
        q = q if packed(q) else copied(q)
        if not (packed(k) and packed(v) and k.stride() == v.stride()):
            k, v = copied(k), copied(v)
        out, lse = forward(q, k, v, stairs)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.stairs = stairs
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout.stride() != out.stride() or dout.data_ptr() % 16:
            dout = copied(dout)
        dq, delta = query_gradient(q, k, v, dout, out, lse, ctx.stairs)
        return dq, *key_gradients(q, k, v, dout, lse, delta, ctx.stairs), None


def attend(q: Tensor, k: Tensor, v: Tensor, stairs: Stairs) -> Tensor:
    """[rows, A, queries, d] from q of that shape and k, v [rows, A, keys, d]; d is 32 or 64."""
    return Attention.apply(q, k, v, stairs)
