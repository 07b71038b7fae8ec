"""models/triton_stairs.py's attention for Hopper, in Gluon: asynchronous products, copies by TMA.

A program is one warpgroup with 64 queries of a head. Forward it goes through blocks of keys as
models/gluon_forward.py has it; backward is in models/gluon_backward.py. models/stairs.py says which: first
those that all its queries see, then those where limits are asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nextvid_mcore.models import gluon_backward
from nextvid_mcore.models.gluon_forward import ask, begin, end, finish, first_block, next_block
from nextvid_mcore.models.gluon_tiles import copied, described, empty, packed, store
from nextvid_mcore.models.stairs import Stairs, limits_on, tiles_on


class Tile(NamedTuple):
    """Queries and keys that are multiplied at once, and the warps that do it."""

    queries: int = 64
    keys: int = 64
    warps: int = 4


FORWARD = QUERY = KEY = Tile()


@gluon.jit
def _forward(
    q, k, v, out, lse, limits, table, scale, heads, tiles, tokens, q_head, k_head,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BN, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D, 16])
    head, tile = gl.program_id(0) // tiles, table + gl.program_id(0) % tiles * 5
    start, stop, first = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
    whole, last = gl.load(tile + 3), gl.load(tile + 4) - 1
    column = head * k_head

    at, blocks = begin(q, k, v), (k, v, first, column, last)
    ask(at, blocks, q, start, head * q_head, 1)
    rows = start + gl.arange(0, BM, gl.SliceLayout(1, scored))
    limit = gl.load(limits + rows, mask=rows < tokens, other=1 << 30)
    state = first_block(at, blocks, limit, scale, scored, summed, 1)
    masked = gl.maximum(whole - 1, 0)
    for j in range(0, masked):
        state = next_block(j, at, blocks, state, None, scale, scored, summed, 1)
    for j in range(masked, last):
        state = next_block(j, at, blocks, state, limit, scale, scored, summed, 1)
    found, top, total = finish(at, last, state, summed)
    gl.store(lse + head.to(gl.int64) * tokens + rows, top + gl.log2(total), mask=rows < stop)
    store(found, out, start, stop, head, heads, D, BM, W)
    end(at)


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
