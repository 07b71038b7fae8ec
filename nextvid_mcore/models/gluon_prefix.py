"""models/triton_prefix.py's attention for Hopper, its products under way while the softmax is computed, as
models/gluon_forward.py has it. A program has 64 queries of a head.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nextvid_mcore.models import triton_prefix
from nextvid_mcore.models.gluon_forward import ask, begin, end, finish, first_block, next_block
from nextvid_mcore.models.gluon_tiles import copied, described
from nextvid_mcore.models.triton_fp8 import ROUND_E4M3

QUERIES = 64  # of a program: what a warpgroup multiplies at once


@gluon.jit
def _prefix(
    q, k, v, out, scale, heads, tiles, i_row, i_head, o_row, o_head, o_token, to_scale, amax, inverse,
    FRAME: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [4 * 64 // D, D // 8], [4, 1], [1, 0])
    row, head = gl.program_id(0) // tiles // heads, gl.program_id(0) // tiles % heads
    start = (tiles - 1 - gl.program_id(0) % tiles) * BM  # the longest first
    stop = (start // FRAME + 1) * (FRAME // BN)
    column = row * i_row + head * i_head

    at, blocks = begin(q, k, v), (k, v, 0, column, stop)
    ask(at, blocks, q, start, column, 0)
    state = first_block(at, blocks, None, scale, scored, summed, 0)
    for j in range(0, stop - 1):
        state = next_block(j, at, blocks, state, None, scale, scored, summed, 0)
    found, top, total = finish(at, stop - 1, state, summed)
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
    end(at)


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
