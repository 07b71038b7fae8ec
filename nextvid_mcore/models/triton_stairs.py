"""Attention to all frames up to one's own, forward and backward: stretches of any tokens a frame, no mask.

In a stretch, query i sees the keys below (i // N + 1) * M, where a frame has N queries and M keys: stairs. So
student and predictor see (models/attention.py): a frame of the student itself and those before, one of the
predictor, whose queries begin a frame later, those before. Blocks of queries and keys that see each other
wholly are computed without a question; only those on the edge compare. The algorithm is FlashAttention's (Dao
et al. 2022): the backward pass makes the scores again, once for the queries' gradients and once for those of
keys and values, so every sum has a fixed order. benchmarks/attention.py compares with FlexAttention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
Stairs = tuple[tuple[int, int, int, int, int], ...]  # of stretches: where queries, keys begin, frames, N, M


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a block, warps of a program, blocks that are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD, QUERIES, KEYS = Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)


# What loops depend on is divided by constants alone: else the compiler doesn't see that it is the same in all
# threads of a program, and a fifth of a loop's instructions go to that.


@triton.jit
def _seen(first, BM: tl.constexpr, BN: tl.constexpr, FRAMES: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Of BM queries: how many keys all of them see, in whole blocks, and how many some of them see."""
    last = tl.minimum(first + BM, FRAMES * N) - 1
    return (first // N + 1) * M // BN * BN, last // N * M + M


@triton.jit
def _seeing(
    first, BM: tl.constexpr, BN: tl.constexpr, FRAMES: tl.constexpr, N: tl.constexpr, M: tl.constexpr
):
    """Of BN keys: from which query on some of them are seen, and from which all, in blocks that end where the
    queries do; the first of these may begin before them.
    """
    last = tl.minimum(first + BN, FRAMES * M) - 1
    end = FRAMES * N
    return end - (end - first // M * N + BM - 1) // BM * BM, end - (end - last // M * N) // BM * BM


@triton.jit
def _place(tile, BM: tl.constexpr, BN: tl.constexpr, KEYS: tl.constexpr, STRETCHES: tl.constexpr):
    """Of a tile of queries or KEYS: where its stretch's queries and keys begin, how many there are, and how
    many in a frame; the tile's first token, and `_seen` or `_seeing` of it.

    One stretch's tiles come before the next one's, and those that see most, or are seen by most, first.
    """
    q_start, k_start, end, visible, n, m = tile * 0, tile * 0, tile * 0, tile * 0, tile * 0, tile * 0
    first, start, stop = tile * 0, tile * 0, tile * 0
    before = 0
    for i in tl.static_range(len(STRETCHES)):
        here = tile >= before
        if KEYS:
            own = (tile - before) * BN
            before += (STRETCHES[i][2] * STRETCHES[i][4] + BN - 1) // BN
            low, high = _seeing(own, BM, BN, STRETCHES[i][2], STRETCHES[i][3], STRETCHES[i][4])
        else:
            before += (STRETCHES[i][2] * STRETCHES[i][3] + BM - 1) // BM
            own = (before - 1 - tile) * BM
            low, high = _seen(own, BM, BN, STRETCHES[i][2], STRETCHES[i][3], STRETCHES[i][4])
        q_start = tl.where(here, STRETCHES[i][0], q_start)
        k_start = tl.where(here, STRETCHES[i][1], k_start)
        end = tl.where(here, STRETCHES[i][2] * STRETCHES[i][3], end)
        visible = tl.where(here, STRETCHES[i][2] * STRETCHES[i][4], visible)
        n = tl.where(here, STRETCHES[i][3], n)
        m = tl.where(here, STRETCHES[i][4], m)
        first = tl.where(here, own, first)
        start = tl.where(here, low, start)
        stop = tl.where(here, high, stop)
    return q_start, k_start, end, visible, n, m, first, start, stop


@triton.jit
def _at(x, first, token, last, D: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr):
    """Where BN tokens of a head lie, `token` from one to the next; EDGE: none after `last`."""
    c = tl.arange(0, D)[None, :]
    if EDGE:
        key = tl.minimum(first + tl.arange(0, BN), last)
        at = x + key.to(tl.int64)[:, None] * token + c
    else:
        at = x + tl.cast(first, tl.int64) * token + tl.arange(0, BN)[:, None] * token + c
    return at


@triton.jit
def _attend(
    query, top, total, found, k, v, k_token, v_token, limit, start, stop, last, scale,
    D: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Queries to keys start to stop; EDGE: not all of them see all, and the last block may not be whole."""
    for first in range(start, stop, BN):
        key = first + tl.arange(0, BN)
        k_at = _at(k, first, k_token, last, D, BN, EDGE)
        v_at = _at(v, first, v_token, last, D, BN, EDGE)
        scores = tl.dot(query, tl.load(k_at).T)
        if EDGE:
            scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(v_at)
        found = tl.dot(p.to(value.dtype), value, found * shrink[:, None])
        top = higher
    return top, total, found


@triton.jit
def _forward(
    q, k, v, out, sums, scale, heads, tokens, q_row, q_head, q_token, k_row, k_head, k_token,
    v_row, v_head, v_token, o_row, o_head, o_token,
    STRETCHES: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output, and the scores' logarithms of sums (of 2). tokens: queries of a row."""
    both = tl.program_id(0) // TILES
    row, head = (both // heads).to(tl.int64), both % heads
    q_start, k_start, end, visible, n, m, first, whole, stop = _place(
        tl.program_id(0) % TILES, BM, BN, False, STRETCHES
    )
    last = visible - 1
    queries = first + tl.arange(0, BM)
    real = queries < end
    seen = tl.minimum(queries, end - 1)
    at = (q_start + seen).to(tl.int64)[:, None]
    c = tl.arange(0, D)[None, :]
    query = tl.load(q + row * q_row + head * q_head + at * q_token + c)
    k += row * k_row + head * k_head + k_start.to(tl.int64) * k_token
    v += row * v_row + head * v_head + k_start.to(tl.int64) * v_token
    limit = (seen // n + 1) * m
    top = tl.full([BM], float("-inf"), tl.float32)  # of the scores so far, as exponents of 2
    total = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM, D], tl.float32)
    top, total, found = _attend(
        query, top, total, found, k, v, k_token, v_token, limit, 0, whole, last, scale, D, BN, False
    )
    top, total, found = _attend(
        query, top, total, found, k, v, k_token, v_token, limit, whole, stop, last, scale, D, BN, True
    )
    to = row * o_row + head * o_head + at * o_token + c
    tl.store(out + to, (found / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    tl.store(sums + tl.cast(both, tl.int64) * tokens + q_start + queries, top + tl.log2(total), mask=real)


@triton.jit
def _ask(
    query, grad, sum_, share, found, k, v, k_token, v_token, limit, start, stop, last, scale,
    D: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The queries' gradient from keys start to stop."""
    for first in range(start, stop, BN):
        key = first + tl.arange(0, BN)
        k_at = _at(k, first, k_token, last, D, BN, EDGE)
        v_at = _at(v, first, v_token, last, D, BN, EDGE)
        keys = tl.load(k_at)
        scores = tl.dot(query, keys.T)
        p = tl.exp2(scores * scale - sum_[:, None])
        if EDGE:
            p = tl.where(key[None, :] < limit[:, None], p, 0.0)
        dp = tl.dot(grad, tl.load(v_at).T)
        found = tl.dot((p * (dp - share[:, None])).to(keys.dtype), keys, found)
    return found


@triton.jit
def _queries_backward(
    q, k, v, out, dout, sums, shares, dq, scale, heads, tokens, q_row, q_head, q_token,
    k_row, k_head, k_token, v_row, v_head, v_token, o_row, o_head, o_token,
    g_row, g_head, g_token, d_row, d_head, d_token,
    STRETCHES: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and of each query the product of output and its gradient: `shares`."""
    both = tl.program_id(0) // TILES
    row, head = (both // heads).to(tl.int64), both % heads
    q_start, k_start, end, visible, n, m, first, whole, stop = _place(
        tl.program_id(0) % TILES, BM, BN, False, STRETCHES
    )
    last = visible - 1
    queries = first + tl.arange(0, BM)
    real = queries < end
    seen = tl.minimum(queries, end - 1)
    at = (q_start + seen).to(tl.int64)[:, None]
    c = tl.arange(0, D)[None, :]
    query = tl.load(q + row * q_row + head * q_head + at * q_token + c)
    grad = tl.load(dout + row * g_row + head * g_head + at * g_token + c)
    answer = tl.load(out + row * o_row + head * o_head + at * o_token + c)
    share = tl.sum(answer.to(tl.float32) * grad.to(tl.float32), 1)
    to = tl.cast(both, tl.int64) * tokens + q_start + seen
    sum_ = tl.load(sums + to)
    tl.store(shares + to, share, mask=real)
    k += row * k_row + head * k_head + k_start.to(tl.int64) * k_token
    v += row * v_row + head * v_head + k_start.to(tl.int64) * v_token
    limit = (seen // n + 1) * m
    found = tl.zeros([BM, D], tl.float32)
    power = scale * LOG2E
    found = _ask(
        query, grad, sum_, share, found, k, v, k_token, v_token, limit, 0, whole, last, power, D, BN, False
    )
    found = _ask(
        query, grad, sum_, share, found, k, v, k_token, v_token, limit, whole, stop, last, power, D, BN, True
    )
    to = dq + row * d_row + head * d_head + at * d_token + c
    tl.store(to, (found * scale).to(dq.dtype.element_ty), mask=real[:, None])


@triton.jit
def _answer(
    key, value, dkey, dvalue, q, dout, sums, shares, q_token, g_token, begin, start, stop, scale,
    D: tl.constexpr, BM: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values from queries start to stop; EDGE: a key is seen from query `begin` on."""
    c = tl.arange(0, D)[None, :]
    for first in range(start, stop, BM):
        index = first + tl.arange(0, BM)
        if EDGE:
            token = tl.maximum(index, 0)
            q_at = q + token.to(tl.int64)[:, None] * q_token + c
            g_at = dout + token.to(tl.int64)[:, None] * g_token + c
        else:
            token = index
            row = tl.arange(0, BM)[:, None]
            q_at = q + tl.cast(first, tl.int64) * q_token + row * q_token + c
            g_at = dout + tl.cast(first, tl.int64) * g_token + row * g_token + c
        query = tl.load(q_at)
        sum_ = tl.load(sums + token)
        scores = tl.dot(key, query.T)
        p = tl.exp2(scores * scale - sum_[None, :])
        if EDGE:
            p = tl.where(index[None, :] >= begin[:, None], p, 0.0)
        grad = tl.load(g_at)
        dvalue = tl.dot(p.to(grad.dtype), grad, dvalue)
        share = tl.load(shares + token)
        dp = tl.dot(value, grad.T)
        dkey = tl.dot((p * (dp - share[None, :])).to(query.dtype), query, dkey)
    return dkey, dvalue


@triton.jit
def _keys_backward(
    q, k, v, dout, sums, shares, dk, dv, scale, heads, tokens, q_row, q_head, q_token, k_row, k_head, k_token,
    v_row, v_head, v_token, g_row, g_head, g_token, d_row, d_head, d_token,
    STRETCHES: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys' and the values' gradients, of equal strides."""
    both = tl.program_id(0) // TILES
    row, head = (both // heads).to(tl.int64), both % heads
    q_start, k_start, end, visible, n, m, first, start, whole = _place(
        tl.program_id(0) % TILES, BM, BN, True, STRETCHES
    )
    last = visible - 1
    keys = first + tl.arange(0, BN)
    seen = tl.minimum(keys, last)
    at = (k_start + seen).to(tl.int64)[:, None]
    c = tl.arange(0, D)[None, :]
    key = tl.load(k + row * k_row + head * k_head + at * k_token + c)
    value = tl.load(v + row * v_row + head * v_head + at * v_token + c)
    q += row * q_row + head * q_head + q_start.to(tl.int64) * q_token
    dout += row * g_row + head * g_head + q_start.to(tl.int64) * g_token
    sums += tl.cast(both, tl.int64) * tokens + q_start
    shares += tl.cast(both, tl.int64) * tokens + q_start
    begin = seen // m * n  # the first query that sees each key
    dkey, dvalue = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    power = scale * LOG2E
    dkey, dvalue = _answer(
        key, value, dkey, dvalue, q, dout, sums, shares, q_token, g_token, begin, start, whole, power,
        D, BM, True,
    )  # fmt: skip
    dkey, dvalue = _answer(
        key, value, dkey, dvalue, q, dout, sums, shares, q_token, g_token, begin, whole, end, power,
        D, BM, False,
    )  # fmt: skip
    to = row * d_row + head * d_head + at * d_token + c
    tl.store(dk + to, (dkey * scale).to(dk.dtype.element_ty), mask=(keys <= last)[:, None])
    tl.store(dv + to, dvalue.to(dv.dtype.element_ty), mask=(keys <= last)[:, None])


def _tiles(stairs: Stairs, tile: Tile, keys: bool) -> int:
    if keys:
        return sum(triton.cdiv(frames * m, tile.keys) for _, _, frames, _, m in stairs)
    return sum(triton.cdiv(frames * n, tile.queries) for _, _, frames, n, _ in stairs)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(i) for x in tensors for i in range(3))


def _like(x: Tensor) -> Tensor:
    """An empty [rows, A, s, d] on memory [s, rows, A, d]."""
    rows, heads, s, d = x.shape
    return x.new_empty(s, rows, heads, d).permute(1, 2, 0, 3)


class Attend(torch.autograd.Function):
    """[rows, A, queries, d] on memory [queries, rows, A, d], from q and k, v [rows, A, keys, d]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, stairs: Stairs) -> Tensor:
        rows, heads, tokens, d = q.shape
        out, scale = _like(q), 1 / math.sqrt(d)
        sums = torch.empty(rows * heads, tokens, dtype=torch.float32, device=q.device)
        tiles = _tiles(stairs, FORWARD, keys=False)
        _forward[(rows * heads * tiles,)](
            q, k, v, out, sums, scale * LOG2E.value, heads, tokens, *_strides(q, k, v, out),
            STRETCHES=stairs, TILES=tiles, D=d, BM=FORWARD.queries, BN=FORWARD.keys,
            num_warps=FORWARD.warps, num_stages=FORWARD.stages,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.stairs = stairs
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        rows, heads, tokens, d = q.shape
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dq, dk, dv, shares, scale = _like(q), _like(k), _like(k), torch.empty_like(sums), 1 / math.sqrt(d)
        tiles = _tiles(ctx.stairs, QUERIES, keys=False)
        _queries_backward[(rows * heads * tiles,)](
            q, k, v, out, dout, sums, shares, dq, scale, heads, tokens, *_strides(q, k, v, out, dout, dq),
            STRETCHES=ctx.stairs, TILES=tiles, D=d, BM=QUERIES.queries, BN=QUERIES.keys,
            num_warps=QUERIES.warps, num_stages=QUERIES.stages,
        )  # fmt: skip
        tiles = _tiles(ctx.stairs, KEYS, keys=True)
        _keys_backward[(rows * heads * tiles,)](
            q, k, v, dout, sums, shares, dk, dv, scale, heads, tokens, *_strides(q, k, v, dout, dk),
            STRETCHES=ctx.stairs, TILES=tiles, D=d, BM=KEYS.queries, BN=KEYS.keys,
            num_warps=KEYS.warps, num_stages=KEYS.stages,
        )  # fmt: skip
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, stairs: Stairs) -> Tensor:
    """`Attend`; the vectors of a head lie in one piece, whose width d is a power of two from 16 on."""
    return Attend.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)), stairs)
