"""Frame-causal attention over whole frames, forward only: no mask, only a length.

Queries of frame f see the keys of frames 0 to f, all of them: a prefix of the clip's keys, which ends where a
block of keys does. A program's queries lie in one frame, so no pair is asked whether it is visible. The
softmax's maximum and sum are kept as FlashAttention does (Dao et al. 2022). What comes out can be written in
FP8 at once, as the linear after it would quantise it. benchmarks/prefix.py compares the kernel with
FlexAttention, cuDNN and others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from nextvid_mcore.models import triton_fp8
from nextvid_mcore.models.triton_fp8 import Scaled

KEYS = 64  # of a block: frames are whole numbers of them


@triton.jit
def _prefix(
    q, k, v, out, scale, heads, tiles, i_row, i_head, i_token, o_row, o_head, o_token,
    to_scale, amax, inverse,
    FRAME: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // tiles
    row = (head // heads).to(tl.int64)
    head = head % heads
    start = (tiles - 1 - tl.program_id(0) % tiles) * BM  # the longest first
    stop = (start // FRAME + 1) * FRAME
    c = tl.arange(0, D)[None, :]
    queries = (start + tl.arange(0, BM)).to(tl.int64)[:, None]
    of = row * i_row + head * i_head
    at = of + tl.arange(0, BN).to(tl.int64)[:, None] * i_token + c
    query = tl.load(q + of + queries * i_token + c)
    top = tl.full([BM], float("-inf"), tl.float32)  # of the scores so far, as exponents of 2
    total = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM, D], tl.float32)
    for first in range(0, stop, BN):
        past = tl.cast(first, tl.int64) * i_token
        scores = tl.dot(query, tl.load(k + past + at).T)
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(v + past + at)
        found = tl.dot(p.to(value.dtype), value, found * shrink[:, None])
        top = higher
    to = row * o_row + head * o_head + queries * o_token + c
    found = found / total[:, None]
    if LIMIT > 0:
        by = tl.load(to_scale)
        if tl.program_id(0) == 0:
            tl.store(inverse, 1.0 / by)
        triton_fp8.tell(tl.max(tl.abs(found)), amax)
        tl.store(out + to, triton_fp8.rounded(found, by, out.dtype.element_ty, LIMIT))
    else:
        tl.store(out + to, found.to(out.dtype.element_ty))


def _run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, frame: int, *low: Tensor) -> None:
    """Fill out [s, rows, A, d]; low: for FP8, scale, largest value, and where 1 / scale goes."""
    if not q.stride() == k.stride() == v.stride() or q.stride(-1) != 1:
        q, k, v = (x.contiguous() for x in (q, k, v))
    rows, heads, s, d = q.shape
    o_token, o_row, o_head = out.stride()[:3]
    queries = 128 if frame % 128 == 0 else 64
    tiles = s // queries
    _prefix[(rows * heads * tiles,)](
        q, k, v, out, math.log2(math.e) / math.sqrt(d), heads, tiles, *q.stride()[:3], o_row, o_head, o_token,
        *(low or (None, None, None)), FRAME=frame, D=d, BM=queries, BN=KEYS,
        LIMIT=torch.finfo(out.dtype).max if low else 0.0, num_warps=4, num_stages=3,
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, frame: int, run: Callable[..., None] = _run) -> Tensor:
    """[rows, A, s, d] from q, k, v of that shape, in whose memory `s` comes first: [s, rows, A, d].

    frame: tokens of one, a multiple of KEYS; d is a power of two from 16 on. run: what launches the kernel.
    """
    rows, heads, s, d = q.shape
    out = torch.empty(s, rows, heads, d, dtype=q.dtype, device=q.device)
    run(q, k, v, out, frame)
    return out.permute(1, 2, 0, 3)


def attend_low(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frame: int,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    run: Callable[..., None] = _run,
) -> Scaled:
    """The same times `scale` in FP8, as rows [s * rows, A * d]; `amax` [1] grows to its largest value."""
    rows, heads, s, d = q.shape
    out = torch.empty(s, rows, heads, d, dtype=dtype, device=q.device)
    inverse = torch.empty(1, dtype=torch.float32, device=q.device)
    run(q, k, v, out, frame, scale, amax, inverse)
    return Scaled(out.view(s * rows, heads * d), None, inverse)
