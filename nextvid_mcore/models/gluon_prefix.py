"""models/triton_prefix.py's attention for Hopper, its products under way while the softmax is computed.

A program is one warpgroup with 64 queries of a head. It asks for the scores of the next keys and for the last
weights' sum of values, computes the next weights as soon as the scores are there, and only then waits for the
sum: FlashAttention-3's overlap inside a warpgroup (Shah et al. 2024). Keys and values come by TMA, one block
ahead. Written in Gluon, Triton's language of explicit layouts, since Triton waits for both products at once.
"""

from __future__ import annotations

import functools
import math

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

from nextvid_mcore.models import triton_prefix
from nextvid_mcore.models.gluon_tiles import copied, described, invalidate, load
from nextvid_mcore.models.triton_fp8 import ROUND_E4M3

QUERIES = 64  # of a program: what a warpgroup multiplies at once


@gluon.jit
def _prefix(
    q, k, v, out, scale, heads, tiles, i_row, i_head, o_row, o_head, o_token, to_scale, amax, inverse,
    FRAME: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weighing: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [4 * 64 // D, D // 8], [4, 1], [1, 0])
    row, head = gl.program_id(0) // tiles // heads, gl.program_id(0) // tiles % heads
    start = (tiles - 1 - gl.program_id(0) % tiles) * BM  # the longest first
    blocks = (start // FRAME + 1) * (FRAME // BN)
    column = row * i_row + head * i_head

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
    load(q, start, column, q_ready.index(0), q_at, True)
    for i in gl.static_range(2):
        load(k, i * BN, column, k_ready.index(i), k_at.index(i), i < blocks)
        load(v, i * BN, column, v_ready.index(i), v_at.index(i), i < blocks)

    none = gl.zeros([BM, BN], gl.float32, scored)
    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(q_at, k_at.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    gl.thread_barrier()
    load(k, 2 * BN, column, k_ready.index(0), k_at.index(0), blocks > 2)
    top = gl.max(scores, 1) * scale  # of the scores so far, as exponents of 2
    p = gl.exp2(scores * scale - top[:, None])
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(v.dtype), weighing)
    found = gl.zeros([BM, D], gl.float32, summed)
    mbarrier.wait(k_ready.index(1), 0, pred=blocks > 1)
    mbarrier.wait(v_ready.index(0), 0)
    for j in range(0, blocks - 1):
        here, there = j % 2, (j + 1) % 2
        scores = warpgroup_mma(q_at, k_at.index(there).permute((1, 0)), none, use_acc=False, is_async=True)
        found = warpgroup_mma(weights, v_at.index(here), found, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        higher = gl.maximum(top, gl.max(scores, 1) * scale)
        shrink = gl.exp2(top - higher)
        p = gl.exp2(scores * scale - higher[:, None])
        total = total * shrink + gl.sum(p, 1)
        top = higher
        # what the next products read; waited for there, ptxas would move the wait for `found` up as well
        mbarrier.wait(k_ready.index(here), (j // 2 + 1) & 1, pred=j + 2 < blocks)
        mbarrier.wait(v_ready.index(there), ((j + 1) // 2) & 1)
        found = warpgroup_mma_wait(0, deps=[found])
        gl.thread_barrier()
        load(k, (j + 3) * BN, column, k_ready.index(there), k_at.index(there), j + 3 < blocks)
        load(v, (j + 2) * BN, column, v_ready.index(here), v_at.index(here), j + 2 < blocks)
        found = found * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
        weights = gl.convert_layout(p.to(v.dtype), weighing)
    found = warpgroup_mma(weights, v_at.index((blocks - 1) % 2), found, is_async=True)
    found = warpgroup_mma_wait(0, deps=[found])
    found = found / gl.convert_layout(total, gl.SliceLayout(1, summed))[:, None]
    if LOW:
        by, most = gl.load(to_scale), gl.max(gl.max(gl.maximum(found, -found), 1), 0)
        if gl.program_id(0) == 0:
            gl.store(inverse, 1.0 / by)
        if most > gl.load(amax):  # few programs still have more
            gl.atomic_max(amax, most)
        found = gl.inline_asm_elementwise(
            ROUND_E4M3, "=r,r,r,r,r", [found * by], dtype=gl.uint8, is_pure=True, pack=4
        )
        found = gl.convert_layout(found, stored)
    else:
        found = gl.convert_layout(found.to(out.dtype.element_ty), stored)
    tokens = (start + gl.arange(0, BM, gl.SliceLayout(1, stored))).to(gl.int64)[:, None]
    c = gl.arange(0, D, gl.SliceLayout(0, stored))[None, :]
    gl.store(out + row.to(gl.int64) * o_row + head * o_head + tokens * o_token + c, found)
    invalidate(q_ready, 1)
    invalidate(k_ready, 2)
    invalidate(v_ready, 2)


def _run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, frame: int, *low: Tensor) -> None:
    """As triton_prefix._run; in FP8 `out` is e4m3."""
    if low:
        out = out.view(torch.uint8)
    if not q.stride() == k.stride() == v.stride() or q.stride(0) != q.shape[1] * q.stride(1):
        q, k, v = copied(q), copied(k), copied(v)
    rows, heads, s, d = q.shape
    o_token, o_row, o_head = out.stride()[:3]
    keys, tiles = 128 if frame % 128 == 0 else 64, s // QUERIES
    _prefix[(rows * heads * tiles,)](
        *described(QUERIES, q), *described(keys, k, v), out, math.log2(math.e) / math.sqrt(d), heads, tiles,
        *q.stride()[:2], o_row, o_head, o_token, *(low or (None, None, None)),
        FRAME=frame, D=d, BM=QUERIES, BN=keys, LOW=bool(low), num_warps=4,
    )  # fmt: skip


attend = functools.partial(triton_prefix.attend, run=_run)
attend_low = functools.partial(triton_prefix.attend_low, run=_run)
