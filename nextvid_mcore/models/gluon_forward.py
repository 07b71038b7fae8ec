"""How a Gluon kernel of attention goes through blocks of keys forward.

A program is one warpgroup with 64 queries of a head. It asks for the scores of the next keys and for the last
weights' sum of values, computes the next weights as soon as the scores are there, and only then waits for the
sum: FlashAttention-3's overlap inside a warpgroup (Shah et al. 2024). Keys and values come by TMA, one block
ahead. Written in Gluon, Triton's language of explicit layouts, since Triton waits for both products at once.

A kernel calls `begin`, `ask`, `first_block`, `next_block` for each that follows, `finish` and, after it has
stored what was found, `end`.

    at      where a tile of queries, two blocks of keys and two of values lie, and barriers for each
    blocks  k, v, the first key, its head's column, stop
    MORE    block i is there where i - MORE < stop: a kernel compares with the number that it has
    limit   of each query the first key that it doesn't see; None: all see the whole block
    state   of each query the largest score so far, as an exponent of 2, the sum of its weights, the sum of
            values, and the weights of the block whose values are added next
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nextvid_mcore.models.gluon_tiles import invalidate, load


@gluon.jit
def begin(q, k, v):
    """`at`, with nothing under way."""
    q_at = gl.allocate_shared_memory(q.dtype, q.block_type.shape, q.layout)
    k_at = gl.allocate_shared_memory(k.dtype, [2] + k.block_type.shape, k.layout)
    v_at = gl.allocate_shared_memory(v.dtype, [2] + v.block_type.shape, v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()  # copies by TMA must see the barriers as they were made
    return q_at, k_at, v_at, q_ready, k_ready, v_ready


@gluon.jit
def ask(at, blocks, q, start, q_column, MORE: gl.constexpr):
    """For the queries from `start` on, in their head's column, and for the first two blocks."""
    q_at, k_at, v_at, q_ready, k_ready, v_ready = at
    k, v, first, column, stop = blocks
    BN: gl.constexpr = k.block_type.shape[0]
    load(q, start, q_column, q_ready.index(0), q_at, True)
    for i in gl.static_range(2):
        load(k, first + i * BN, column, k_ready.index(i), k_at.index(i), i - MORE < stop)
        load(v, first + i * BN, column, v_ready.index(i), v_at.index(i), i - MORE < stop)


@gluon.jit
def _scores(q_at, k_at, scored: gl.constexpr):
    BM: gl.constexpr = q_at.shape[0]
    BN: gl.constexpr = k_at.shape[0]
    none = gl.zeros([BM, BN], gl.float32, scored)
    return warpgroup_mma(q_at, k_at.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _seen(scores, first, limit, scored: gl.constexpr):
    if limit is not None:
        BN: gl.constexpr = scores.shape[1]
        keys = first + gl.arange(0, BN, gl.SliceLayout(0, scored))
        scores = gl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def first_block(at, blocks, limit, scale, scored: gl.constexpr, summed: gl.constexpr, MORE: gl.constexpr):
    """`state` with the weights of block 0, of which every query sees a key."""
    q_at, k_at, v_at, q_ready, k_ready, v_ready = at
    k, v, first, column, stop = blocks
    BM: gl.constexpr = q_at.shape[0]
    D: gl.constexpr = q_at.shape[1]
    BN: gl.constexpr = k.block_type.shape[0]
    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = _scores(q_at, k_at.index(0), scored)
    scores = warpgroup_mma_wait(0, deps=[scores])
    gl.thread_barrier()
    load(k, first + 2 * BN, column, k_ready.index(0), k_at.index(0), 2 - MORE < stop)
    scores = _seen(scores, first, limit, scored)
    top = gl.max(scores, 1) * scale
    p = gl.exp2(scores * scale - top[:, None])
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, summed, 2))
    found = gl.zeros([BM, D], gl.float32, summed)
    mbarrier.wait(k_ready.index(1), 0, pred=1 - MORE < stop)
    mbarrier.wait(v_ready.index(0), 0)
    return top, total, found, weights


@gluon.jit
def next_block(
    j, at, blocks, state, limit, scale, scored: gl.constexpr, summed: gl.constexpr, MORE: gl.constexpr
):
    """`state` with the weights of block j + 1, which `limit` is about, and the values of block j."""
    q_at, k_at, v_at, q_ready, k_ready, v_ready = at
    k, v, first, column, stop = blocks
    top, total, found, weights = state
    BN: gl.constexpr = k.block_type.shape[0]
    here, there = j % 2, (j + 1) % 2
    scores = _scores(q_at, k_at.index(there), scored)
    found = warpgroup_mma(weights, v_at.index(here), found, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    scores = _seen(scores, first + (j + 1) * BN, limit, scored)
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    shrink = gl.exp2(top - higher)
    p = gl.exp2(scores * scale - higher[:, None])
    total = total * shrink + gl.sum(p, 1)
    # what the next products read; waited for there, ptxas would move the wait for `found` up as well
    mbarrier.wait(k_ready.index(here), (j // 2 + 1) & 1, pred=j + (2 - MORE) < stop)
    mbarrier.wait(v_ready.index(there), ((j + 1) // 2) & 1)
    found = warpgroup_mma_wait(0, deps=[found])
    gl.thread_barrier()
    load(k, first + (j + 3) * BN, column, k_ready.index(there), k_at.index(there), j + (3 - MORE) < stop)
    load(v, first + (j + 2) * BN, column, v_ready.index(here), v_at.index(here), j + (2 - MORE) < stop)
    found = found * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
    return higher, total, found, gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, summed, 2))


@gluon.jit
def finish(at, last, state, summed: gl.constexpr):
    """What was found, [BM, D], with the last block's values; the largest scores and the sums of weights."""
    q_at, k_at, v_at, q_ready, k_ready, v_ready = at
    top, total, found, weights = state
    found = warpgroup_mma(weights, v_at.index(last % 2), found, is_async=True)
    found = warpgroup_mma_wait(0, deps=[found])
    return found / gl.convert_layout(total, gl.SliceLayout(1, summed))[:, None], top, total


@gluon.jit
def end(at):
    q_at, k_at, v_at, q_ready, k_ready, v_ready = at
    invalidate(q_ready, 1)
    invalidate(k_ready, 2)
    invalidate(v_ready, 2)
