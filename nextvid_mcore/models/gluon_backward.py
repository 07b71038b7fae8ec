"""Backward of models/gluon_stairs.py: the gradients of queries, and those of keys and values.

Each kernel makes the weights again, and none adds into memory, so the same comes out every time; with heads
of 64 such additions would cost as much as the two products that they save. What overlaps is one program's
products with another's softmax: on an H100 kernels of which a processor holds three or more beat those that
overlap more by themselves. What a program goes through comes by TMA, a block ahead.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nextvid_mcore.models.gluon_tiles import invalidate, load_both, store

LN2: gl.constexpr = gl.constexpr(math.log(2))


@gluon.jit
def _query_step(
    j, blocks, query, given, k, v, k_at, v_at, ready, column, first, limit, scale, lse, delta, found,
    BM: gl.constexpr, BN: gl.constexpr, scored: gl.constexpr, summed: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Adds what the keys of block j give to the queries' gradient."""
    weighing: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    here = j % 2
    none = gl.zeros([BM, BN], gl.float32, scored)
    mbarrier.wait(ready.index(here), (j // 2) & 1)
    scores = warpgroup_mma(query, k_at.index(here).permute((1, 0)), none, use_acc=False, is_async=True)
    dp = warpgroup_mma(given, v_at.index(here).permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    p = gl.exp2(scores * scale - lse[:, None])
    if MASKED:
        keys = first + j * BN + gl.arange(0, BN, gl.SliceLayout(0, scored))
        p = gl.where(keys[None, :] < limit[:, None], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    weights = gl.convert_layout((p * (dp - delta[:, None])).to(k.dtype), weighing)
    found = warpgroup_mma(weights, k_at.index(here), found, is_async=True)
    found = warpgroup_mma_wait(0, deps=[found])
    gl.thread_barrier()
    load_both(
        k, v, first + (j + 2) * BN, column, column, ready.index(here), k_at.index(here), v_at.index(here),
        j + 2 < blocks,
    )  # fmt: skip
    return found


@gluon.jit
def query_gradient(
    q, k, v, dout, out, dq, lse, delta, limits, table, scale, heads, tiles, tokens, q_head, k_head,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """And delta, the sum of out * dout over a head, which the other kernel needs too."""
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BN, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D, 16])
    kept: gl.constexpr = gl.DotOperandLayout(0, scored, 2)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [4 * 64 // D, D // 8], [W, 1], [1, 0])
    head, tile = gl.program_id(0) // tiles, table + gl.program_id(0) % tiles * 5
    start, stop, first = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
    whole, blocks = gl.load(tile + 3), gl.load(tile + 4)
    column = head * k_head

    q_at = gl.allocate_shared_memory(q.dtype, [BM, D], q.layout)
    d_at = gl.allocate_shared_memory(q.dtype, [BM, D], q.layout)
    k_at = gl.allocate_shared_memory(k.dtype, [2, BN, D], k.layout)
    v_at = gl.allocate_shared_memory(v.dtype, [2, BN, D], v.layout)
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()  # copies by TMA must see the barriers as they were made
    load_both(q, dout, start, head * q_head, head * D, ready.index(2), q_at, d_at, True)
    for i in gl.static_range(2):
        load_both(
            k, v, first + i * BN, column, column, ready.index(i), k_at.index(i), v_at.index(i), i < blocks
        )

    at = (start + gl.arange(0, BM, gl.SliceLayout(1, stored)))[:, None]
    c = gl.arange(0, D, gl.SliceLayout(0, stored))[None, :]
    attended = gl.load(out + (at.to(gl.int64) * heads + head) * D + c, mask=at < stop, other=0.0)
    rows = start + gl.arange(0, BM, gl.SliceLayout(1, scored))
    limit = gl.load(limits + rows, mask=rows < stop, other=0)
    of = head.to(gl.int64) * tokens + rows
    high = gl.load(lse + of, mask=rows < stop, other=0.0)
    mbarrier.wait(ready.index(2), 0)
    dot = gl.sum(attended.to(gl.float32) * d_at.load(stored).to(gl.float32), 1)
    dot = gl.convert_layout(dot, gl.SliceLayout(1, scored))
    gl.store(delta + of, dot, mask=rows < stop)
    query, given = q_at.load(kept), d_at.load(kept)
    found = gl.zeros([BM, D], gl.float32, summed)
    for j in range(0, whole):
        found = _query_step(
            j, blocks, query, given, k, v, k_at, v_at, ready, column, first, limit, scale, high, dot, found,
            BM, BN, scored, summed, False,
        )  # fmt: skip
    for j in range(whole, blocks):
        found = _query_step(
            j, blocks, query, given, k, v, k_at, v_at, ready, column, first, limit, scale, high, dot, found,
            BM, BN, scored, summed, True,
        )  # fmt: skip
    store(found * (scale * LN2), dq, start, stop, head, heads, D, BM, W)
    invalidate(ready, 3)


@gluon.jit
def _sums(of, first, wanted, BM: gl.constexpr, W: gl.constexpr):
    """[first, first + BM) of a head's lse or delta; TMA would want rows in fours."""
    rows = first + gl.arange(0, BM, gl.BlockedLayout([1], [32], [W], [0]))
    return gl.load(of + rows, mask=(rows >= 0) & wanted, other=0.0)


@gluon.jit
def _key_step(
    i, count, k_at, v_at, q, dout, lse, delta, q_at, d_at, l_at, e_at, ready, q_column, d_column, q_stop,
    limits, keys, scale, inverse, dk, dv,
    BM: gl.constexpr, BN: gl.constexpr, W: gl.constexpr, scored: gl.constexpr, summed: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds what the i-th tile of queries from the end gives to the gradients of keys and values."""
    weighing: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    here = i % 2
    none = gl.zeros([BN, BM], gl.float32, scored)
    if MASKED:
        rows = q_stop - (i + 1) * BM + gl.arange(0, BM, gl.SliceLayout(0, scored))
        limit = gl.load(limits + rows, mask=rows >= 0, other=0)
    next_lse = _sums(lse, q_stop - (i + 2) * BM, i + 1 < count, BM, W)
    next_delta = _sums(delta, q_stop - (i + 2) * BM, i + 1 < count, BM, W)
    mbarrier.wait(ready.index(here), (i // 2) & 1)
    # the sums are where the scores begin: registers for one vector less, so that three programs fit
    scores = none - (l_at.index(here).load(gl.SliceLayout(0, scored)) * inverse)[None, :]
    scores = warpgroup_mma(k_at, q_at.index(here).permute((1, 0)), scores, is_async=True)
    dp = warpgroup_mma(v_at, d_at.index(here).permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    p = gl.exp2(scores * scale)
    if MASKED:
        p = gl.where(keys[:, None] < limit[None, :], p, 0.0)
    weights = gl.convert_layout(p.to(q.dtype), weighing)
    dp = warpgroup_mma_wait(0, deps=[dp])
    dv = warpgroup_mma(weights, d_at.index(here), dv, is_async=True)
    dot = e_at.index(here).load(gl.SliceLayout(0, scored))
    changes = gl.convert_layout((p * (dp - dot[None, :])).to(q.dtype), weighing)
    dk = warpgroup_mma(changes, q_at.index(here), dk, is_async=True)
    dk, dv, weights, changes = warpgroup_mma_wait(0, deps=[dk, dv, weights, changes])
    gl.thread_barrier()
    load_both(
        q, dout, q_stop - (i + 3) * BM, q_column, d_column, ready.index(here), q_at.index(here),
        d_at.index(here), i + 2 < count,
    )  # fmt: skip
    l_at.index((i + 1) % 2).store(next_lse)
    e_at.index((i + 1) % 2).store(next_delta)
    return dk, dv


@gluon.jit
def key_gradients(
    q, k, v, dout, lse, delta, dk, dv, limits, table, scale, heads, tiles, tokens, q_head, k_head,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BM, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D, 16])
    head, tile = gl.program_id(0) // tiles, table + gl.program_id(0) % tiles * 5
    start, stop, q_stop = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
    whole, count = gl.load(tile + 3), gl.load(tile + 4)
    q_column, d_column = head * q_head, head * D
    lse, delta = lse + head.to(gl.int64) * tokens, delta + head.to(gl.int64) * tokens

    k_at = gl.allocate_shared_memory(k.dtype, [BN, D], k.layout)
    v_at = gl.allocate_shared_memory(v.dtype, [BN, D], v.layout)
    q_at = gl.allocate_shared_memory(q.dtype, [2, BM, D], q.layout)
    d_at = gl.allocate_shared_memory(q.dtype, [2, BM, D], q.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    l_at = gl.allocate_shared_memory(gl.float32, [2, BM], flat)
    e_at = gl.allocate_shared_memory(gl.float32, [2, BM], flat)
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()  # copies by TMA must see the barriers as they were made
    load_both(k, v, start, head * k_head, head * k_head, ready.index(2), k_at, v_at, True)
    for i in gl.static_range(2):
        load_both(
            q, dout, q_stop - (i + 1) * BM, q_column, d_column, ready.index(i), q_at.index(i), d_at.index(i),
            i < count,
        )  # fmt: skip
    l_at.index(0).store(_sums(lse, q_stop - BM, True, BM, W))
    e_at.index(0).store(_sums(delta, q_stop - BM, True, BM, W))
    keys = start + gl.arange(0, BN, gl.SliceLayout(1, scored))
    inverse = 1.0 / scale
    found_k = gl.zeros([BN, D], gl.float32, summed)
    found_v = gl.zeros([BN, D], gl.float32, summed)
    mbarrier.wait(ready.index(2), 0)
    for i in range(0, whole):
        found_k, found_v = _key_step(
            i, count, k_at, v_at, q, dout, lse, delta, q_at, d_at, l_at, e_at, ready, q_column, d_column,
            q_stop, limits, keys, scale, inverse, found_k, found_v, BM, BN, W, scored, summed, False,
        )  # fmt: skip
    for i in range(whole, count):
        found_k, found_v = _key_step(
            i, count, k_at, v_at, q, dout, lse, delta, q_at, d_at, l_at, e_at, ready, q_column, d_column,
            q_stop, limits, keys, scale, inverse, found_k, found_v, BM, BN, W, scored, summed, True,
        )  # fmt: skip
    store(found_k * (scale * LN2), dk, start, stop, head, heads, D, BN, W)
    store(found_v, dv, start, stop, head, heads, D, BN, W)
    invalidate(ready, 3)
