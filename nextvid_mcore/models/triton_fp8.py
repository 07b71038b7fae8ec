"""GELU and LayerNorm, and GELU's and rotary positions' derivatives, that write FP8: a kernel in Triton each,
and its reference in torch.

A linear in FP8 reads its input in one direction for the product and, where it is trained, in the other for
the weight's gradient; Hopper's products take no other layout. Transformer Engine makes both from a tensor in
bf16, which is written and read once more than need be. These kernels multiply by the scale that the quantiser
has (`delayed` knows it beforehand), round, write both directions and leave the largest value where the
quantiser wants it. Derivatives add up the bias's gradient meanwhile, share by share, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nextvid_mcore.models import triton_pieces
from nextvid_mcore.models.triton_pieces import quick

GPU = tl.constexpr(triton_pieces.PTX)
K = tl.constexpr(0.84932180)  # exp(-a^2 / 2) is 2 to the power of -(K a)^2
# bf16 to fp32, two at a time: of a plain conversion Triton 3.6 makes two, and computes all that follows once
# as the rows are stored and once as the columns are
WIDEN = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
# fp32 to FP8, four at a time, beyond the range to its end. Of Triton's own conversion, whose pairs are packed
# once as the rows want them and once as the columns do, ptxas 12.8 made wrong bytes in half of the columns
_ROUND = (
    "{{ .reg .b16 a, b; cvt.rn.satfinite.{0}.f32 a, $2, $1; cvt.rn.satfinite.{0}.f32 b, $4, $3; "
    "mov.b32 $0, {{a, b}}; }}"
)
ROUND_E4M3, ROUND_E5M2 = (tl.constexpr(_ROUND.format(name)) for name in ("e4m3x2", "e5m2x2"))


@dataclass(frozen=True)
class Scaled:
    """Values times a scale, in FP8: `rows` [N, W], `columns` [W, N], or both; `inverse` [1] is 1 / scale."""

    rows: Tensor | None
    columns: Tensor | None
    inverse: Tensor


@triton.jit
def tell(most, amax):
    """Let `amax` grow to `most`."""
    if most > tl.load(amax):  # few programs still have more
        tl.atomic_max(amax, most)


@triton.jit
def rounded(y, scale, low_dtype: tl.constexpr, LIMIT: tl.constexpr):
    """`y` times `scale`, in FP8."""
    low = y * scale
    if GPU:
        how: tl.constexpr = ROUND_E4M3 if LIMIT == 448.0 else ROUND_E5M2
        low = tl.inline_asm_elementwise(how, "=r,r,r,r,r", [low], tl.uint8, is_pure=True, pack=4)
        return low.to(low_dtype, bitcast=True)
    else:
        return tl.clamp(low, -LIMIT, LIMIT).to(low_dtype)


@triton.jit
def _put(y, scale, rows_out, columns_out, r, c, inside, rows, W: tl.constexpr, LIMIT: tl.constexpr,
         COLUMNS: tl.constexpr, ROWS: tl.constexpr = True):  # fmt: skip
    """The tile `y` in FP8 at rows `r` and columns `c` of [rows, W], where it is `inside`."""
    low = rounded(y, scale, rows_out.dtype.element_ty if ROWS else columns_out.dtype.element_ty, LIMIT)
    if ROWS:
        tl.store(rows_out + r.to(tl.int64)[:, None] * W + c[None, :], low, mask=inside)
    if COLUMNS:
        at = columns_out + c.to(tl.int64)[:, None] * rows + r[None, :]
        tl.store(at, tl.trans(low), mask=tl.trans(inside))


@triton.jit
def _wide(x):
    if GPU and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def _tail(z):
    """triton_pieces._tail of z / K, with fewer terms: a relative error of 5e-5, where FP8 rounds by 6e-2."""
    t, bell = quick(1.0 + 0.33635203 * tl.abs(z), -(z * z), GPU)
    p = 0.28672928 * t - 0.069839106
    p = p * t + 0.17770549
    p = p * t + 0.10542935
    return p * t * bell, bell


@triton.jit
def _gelu_forward(x, bias, scale, amax, inverse, rows_out, columns_out, rows,
                  W: tl.constexpr, LIMIT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                  EVEN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    tiles: tl.constexpr = (W + BC - 1) // BC  # one axis for all programs: a second one ends at 65,535
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    by = tl.load(scale)
    if tl.program_id(0) == 0:
        tl.store(inverse, 1.0 / by)
    inside = (r < rows)[:, None] & (c < W)[None, :]
    a = _wide(tl.load(x + r.to(tl.int64)[:, None] * W + c[None, :], mask=inside, other=0.0))
    b = tl.load(bias + c, mask=c < W, other=0.0).to(tl.float32) * K
    z = a * K + b[None, :]
    tail, _ = _tail(z)
    y = tl.maximum(z, 0.0) - tl.abs(z) * tail
    if not EVEN:
        y = tl.where(inside, y, 0.0)
    tell(tl.max(tl.abs(y)) / K, amax)
    _put(y, by / K, rows_out, columns_out, r, c, inside, rows, W, LIMIT, COLUMNS, ROWS)


@triton.jit
def _gelu_backward(dy, x, bias, scale, amax, inverse, rows_out, columns_out, sums, rows,
                   W: tl.constexpr, LIMIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    by = tl.load(scale)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(inverse, 1.0 / by)
    inside = (r < rows)[:, None] & (c < W)[None, :]
    at = r.to(tl.int64)[:, None] * W + c[None, :]
    b = tl.load(bias + c, mask=c < W, other=0.0).to(tl.float32) * K
    z = _wide(tl.load(x + at, mask=inside, other=0.0)) * K + b[None, :]
    grad = _wide(tl.load(dy + at, mask=inside, other=0.0))  # 0 outside, and so the product
    tail, bell = _tail(z)
    grad = grad * (tl.where(z < 0, tail, 1.0 - tail) + z * bell * 0.46971864)
    tl.store(sums + tl.program_id(1).to(tl.int64) * W + c, tl.sum(grad, 0), mask=c < W)
    tell(tl.max(tl.abs(grad)), amax)
    _put(grad, by, rows_out, columns_out, r, c, inside, rows, W, LIMIT, True)


@triton.jit
def _norm(x, y, bias, weight, shift, total, scale, amax, inverse, rows_out, rows, eps,
          D: tl.constexpr, LIMIT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
          BR: tl.constexpr):  # fmt: skip
    r, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BLOCK)
    by = tl.load(scale)
    if tl.program_id(0) == 0:
        tl.store(inverse, 1.0 / by)
    inside = (r < rows)[:, None] & (c < D)[None, :]
    at = r.to(tl.int64)[:, None] * D + c[None, :]
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        a += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        a += tl.load(bias + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        tl.store(total + at, a, mask=inside)
    a = tl.where(inside, a - (tl.sum(a, 1) / D)[:, None], 0.0)
    a = a * (1.0 / tl.sqrt(tl.sum(a * a, 1) / D + eps))[:, None]
    a = a * tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    a = a + tl.load(shift + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    a = tl.where(inside, a, 0.0)
    tell(tl.max(tl.abs(a)), amax)
    _put(a, by, rows_out, None, r, c, inside, rows, D, LIMIT, False)


@triton.jit
def _norm_both(x, y, bias, weight, shift, total, mean, rstd, scale, amax, inverse, rows_out, columns_out,
               rows, eps, D: tl.constexpr, LIMIT: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr,
               BC: tl.constexpr):  # fmt: skip
    """Whole rows, piece by piece and twice: for mean and variance; from the cache, for what is written."""
    r, lane = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BC)
    start = r.to(tl.int64)[:, None] * D
    by = tl.load(scale)
    if tl.program_id(0) == 0:
        tl.store(inverse, 1.0 / by)
    level = tl.zeros([BR, BC], tl.float32)  # mean of a lane so far, and sum of its squared differences
    spread = tl.zeros([BR, BC], tl.float32)
    for first in range(0, D, BC):
        c = first + lane
        inside = (r < rows)[:, None] & (c < D)[None, :]
        a = tl.load(x + start + c[None, :], mask=inside, other=0.0)
        if ADD:
            a = a.to(tl.float32) + tl.load(y + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
            a += tl.load(bias + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
            a = a.to(total.dtype.element_ty)
            tl.store(total + start + c[None, :], a, mask=inside)
        apart = tl.where(inside, a.to(tl.float32) - level, 0.0)
        level += apart / (first // BC + 1)
        spread += tl.where(inside, apart * (a.to(tl.float32) - level), 0.0)
    count = ((D - lane + BC - 1) // BC).to(tl.float32)[None, :]  # of a lane
    m = tl.sum(level * count, 1) / D
    apart = level - m[:, None]
    s = 1.0 / tl.sqrt(tl.sum(spread + count * apart * apart, 1) / D + eps)
    tl.store(mean + r, m, mask=r < rows)
    tl.store(rstd + r, s, mask=r < rows)
    tl.debug_barrier()  # what was added is read again
    most = tl.zeros([BR, BC], tl.float32)
    for first in range(0, D, BC):
        c = first + lane
        inside = (r < rows)[:, None] & (c < D)[None, :]
        a = tl.load((total if ADD else x) + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
        a = (a - m[:, None]) * s[:, None] * tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        a = tl.where(inside, a + tl.load(shift + c, mask=c < D, other=0.0).to(tl.float32)[None, :], 0.0)
        most = tl.maximum(most, tl.abs(a))
        _put(a, by, rows_out, columns_out, r, c, inside, rows, D, LIMIT, True)
    tell(tl.max(most), amax)


@triton.jit
def _turn_backward(dq, dk, dv, cos, sin, scale, amax, inverse, rows_out, columns_out, sums, tokens,
                   A: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, LIMIT: tl.constexpr,
                   HEADS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """HEADS heads of BT tokens of queries, keys or values: as triton_pieces._turn goes back, not rounded."""
    W: tl.constexpr = A * 3 * D
    shares: tl.constexpr = (A + HEADS - 1) // HEADS
    kind, part = tl.program_id(0) % 3, tl.program_id(0) // 3 // shares
    by = tl.load(scale)
    if tl.program_id(0) == 0:
        tl.store(inverse, 1.0 / by)
    x = tl.where(kind == 0, dq, tl.where(kind == 1, dk, dv))
    t, d = part * BT + tl.arange(0, BT), tl.arange(0, BD)
    low = d < HALF
    partner = tl.where(low, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    turns = (d < 2 * HALF) & (kind < 2)
    angle = t.to(tl.int64)[:, None] * HALF + tl.where(low, d, d - HALF)[None, :]
    c = tl.load(cos + angle, mask=inside & turns[None, :], other=1.0)
    s = tl.load(sin + angle, mask=inside & turns[None, :], other=0.0)
    s = tl.where(low[None, :], s, -s)
    # Triton's interpreter multiplies the bits of bf16 as if they were integers
    swap = (d[:, None] == partner[None, :]).to(dq.dtype.element_ty if GPU else tl.float32)
    most = tl.zeros([BT, BD], tl.float32)
    head = tl.program_id(0) // 3 % shares * HEADS
    at = x + t.to(tl.int64)[:, None] * (A * D)
    ahead = tl.load(at + head * D + d[None, :], mask=inside, other=0.0)
    stop = tl.minimum(head + HEADS, A)
    while head < stop:
        y = ahead
        there = inside & (head + 1 < stop)
        ahead = tl.load(at + (head + 1) * D + d[None, :], mask=there, other=0.0)
        y = y.to(tl.float32) * c + tl.dot(y.to(swap.dtype), swap, input_precision="ieee") * s
        to = (head * 3 + kind) * D + d
        tl.store(sums + part.to(tl.int64) * W + to, tl.sum(y, 0), mask=d < D)
        _put(y, by, rows_out, columns_out, t, to, inside, tokens, W, LIMIT, True)
        most = tl.maximum(most, tl.abs(y))
        head += 1
    tell(tl.max(most), amax)


TILE = {"BR": 128, "BC": 64, "num_warps": 8}  # with both directions: 128 bytes in a row of columns
BACK = {"BR": 64, "BC": 64, "num_warps": 4}  # of the derivative, which has more in registers
FLAT = {"BR": 16, "BC": 512, "num_warps": 8}  # without columns
ROW = {"BR": 1, "num_warps": 1}  # a warp a row: its sums need no barrier
BOTH = {"BR": 16, "BC": 128, "num_warps": 8}  # a norm in both directions: 16 bytes in a row of columns
TURN = {"BT": 64, "HEADS": 8, "num_warps": 8, "maxnreg": 128}  # two programs a multiprocessor


def gelu(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    columns: bool,
    rows: bool = True,
) -> Scaled:
    """Exact GELU of x [N, W] + bias [W], times `scale`, in `dtype`; `amax` [1] grows to its largest value."""
    if not x.is_cuda:
        out = _scaled(F.gelu(x.float() + bias.float()), scale, amax, dtype, columns)
        return out if rows else replace(out, rows=None)
    out, (number, width) = _room(x, x.shape, dtype, columns, rows), x.shape
    tile = TILE if columns else FLAT
    grid = (triton.cdiv(width, tile["BC"]) * triton.cdiv(number, tile["BR"]),)
    _gelu_forward[grid](
        x, bias, scale, amax, out.inverse, out.rows, out.columns, number,
        W=width, LIMIT=torch.finfo(dtype).max, COLUMNS=columns, ROWS=rows,
        EVEN=number % tile["BR"] == width % tile["BC"] == 0, **tile,
    )  # fmt: skip
    return out


def gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype
) -> tuple[Scaled, Tensor]:
    """Gradient of x by `dy` [N, W] as `gelu` gives its values, both directions, and the bias's [W]."""
    if not x.is_cuda:
        a = (x.float() + bias.float()).requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(F.gelu(a), a, dy.float())
        return _scaled(grad, scale, amax, dtype, True), grad.sum(0).to(bias.dtype)
    out, (rows, width) = _room(x, x.shape, dtype, True), x.shape
    grid = (triton.cdiv(width, BACK["BC"]), triton.cdiv(rows, BACK["BR"]))
    sums = torch.empty(grid[1], width, dtype=torch.float32, device=x.device)
    _gelu_backward[grid](
        dy, x, bias, scale, amax, out.inverse, out.rows, out.columns, sums, rows,
        W=width, LIMIT=torch.finfo(dtype).max, **BACK,
    )  # fmt: skip
    return out, triton_pieces.sum_of(sums, bias.dtype)


def norm(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Scaled]:
    """x [N, D] (+ y + bias [D]), and its LayerNorm as `gelu` gives its values, rows alone."""
    if not x.is_cuda:
        total = x if y is None else x + (y + bias)
        normed = F.layer_norm(total.float(), total.shape[-1:], weight.float(), shift.float(), eps)
        return total, _scaled(normed, scale, amax, dtype, False)
    out, (rows, width), block = _room(x, x.shape, dtype, False), x.shape, triton.next_power_of_2(x.shape[-1])
    total = x if y is None else torch.empty_like(x)
    _norm[(triton.cdiv(rows, ROW["BR"]),)](
        x, y, bias, weight, shift, total, scale, amax, out.inverse, out.rows, rows, eps,
        D=width, LIMIT=torch.finfo(dtype).max, ADD=y is not None, BLOCK=block, **ROW,
    )  # fmt: skip
    return total, out


def norm_both(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Scaled, Tensor, Tensor]:
    """The same in both directions, with what the backward pass needs: mean and 1 / deviation [N]."""
    if not x.is_cuda:
        total, _ = norm(x, y, bias, weight, shift, eps, scale, amax, dtype)
        given = total.float(), total.shape[-1:], weight.float(), shift.float(), eps
        normed, mean, rstd = torch.native_layer_norm(*given)
        return total, _scaled(normed, scale, amax, dtype, True), mean[:, 0], rstd[:, 0]
    out, (rows, width) = _room(x, x.shape, dtype, True), x.shape
    total = x if y is None else torch.empty_like(x)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    _norm_both[(triton.cdiv(rows, BOTH["BR"]),)](
        x, y, bias, weight, shift, total, mean, rstd, scale, amax, out.inverse, out.rows, out.columns, rows,
        eps, D=width, LIMIT=torch.finfo(dtype).max, ADD=y is not None, **BOTH,
    )  # fmt: skip
    return total, out, mean, rstd


def turn_backward(
    grads: Sequence[Tensor], cos: Tensor, sin: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype
) -> tuple[Scaled, Tensor]:
    """Gradient of packed heads [N, A * 3 * d], both directions, and of a bias added to them.

    grads: of queries, keys and values [N, A, d]; the first two were turned by cos and sin, fp32 [N, R / 2].
    """
    (tokens, heads, width), half = grads[0].shape, cos.shape[1]
    if not grads[0].is_cuda:
        q, k, v = (x.float() for x in grads)
        c, s = cos[:, None], sin[:, None]
        parts = []
        for x in (q, k):
            first, second = x[..., :half], x[..., half : 2 * half]
            parts.append(torch.cat((first * c + second * s, second * c - first * s, x[..., 2 * half :]), -1))
        packed = torch.stack((*parts, v), 2).flatten(1)
        return _scaled(packed, scale, amax, dtype, True), packed.sum(0).to(grads[0].dtype)
    shares, parts = triton.cdiv(heads, TURN["HEADS"]), triton.cdiv(tokens, TURN["BT"])
    out = _room(grads[0], (tokens, heads * 3 * width), dtype, True)
    sums = grads[0].new_empty(parts, heads * 3 * width, dtype=torch.float32)
    _turn_backward[(parts * shares * 3,)](
        *(x.contiguous() for x in grads), cos, sin, scale, amax, out.inverse, out.rows, out.columns, sums,
        tokens, A=heads, D=width, HALF=cos.shape[1], LIMIT=torch.finfo(dtype).max,
        BD=max(16, triton.next_power_of_2(width)), **TURN,
    )  # fmt: skip
    return out, triton_pieces.sum_of(sums, grads[0].dtype)


def _room(x: Tensor, size: Sequence[int], dtype: torch.dtype, columns: bool, rows: bool = True) -> Scaled:
    return Scaled(
        x.new_empty(size, dtype=dtype) if rows else None,
        x.new_empty(size[::-1], dtype=dtype) if columns else None,
        x.new_empty(1, dtype=torch.float32),
    )


def _scaled(y: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype, columns: bool) -> Scaled:
    """The reference: fp32 `y` as the kernels store it."""
    amax.copy_(torch.maximum(amax, y.abs().max()))
    limit = torch.finfo(dtype).max
    low = (y * scale).clamp(-limit, limit).to(dtype)
    return Scaled(low, low.t().contiguous() if columns else None, scale.reciprocal().reshape(1))
