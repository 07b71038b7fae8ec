"""GELU, its derivative and LayerNorm that write FP8, a kernel in Triton each, and their references in torch.

A linear in FP8 reads its input in one direction for the product and, where it is trained, in the other for
the weight's gradient; Hopper's products take no other layout. Transformer Engine makes both from a tensor in
bf16: with GELU before it that tensor is written and read once more than need be. Here GELU's kernel
multiplies by the scale that the quantiser has (`delayed` knows it beforehand), rounds, writes both directions
and leaves the largest value where the quantiser wants it. The derivative adds up the bias's gradient
meanwhile, share by share, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nextvid_mcore.models import triton_pieces

GPU = tl.constexpr(triton_pieces.PTX)
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
def _store(y, scale, amax, rows_out, columns_out, r, c, rows, W: tl.constexpr, LIMIT: tl.constexpr,
           COLUMNS: tl.constexpr, ROWS: tl.constexpr = True):  # fmt: skip
    """Largest value, and the tile `y` in FP8 at rows `r` and columns `c`; outside of the matrix y is 0."""
    inside = (r < rows)[:, None] & (c < W)[None, :]
    most = tl.max(tl.abs(y))
    if most > tl.load(amax):  # few programs still have more
        tl.atomic_max(amax, most)
    low = y * tl.load(scale)
    low_dtype: tl.constexpr = rows_out.dtype.element_ty if ROWS else columns_out.dtype.element_ty
    if GPU:
        if LIMIT == 448.0:
            low = tl.inline_asm_elementwise(ROUND_E4M3, "=r,r,r,r,r", [low], tl.uint8, is_pure=True, pack=4)
        else:
            low = tl.inline_asm_elementwise(ROUND_E5M2, "=r,r,r,r,r", [low], tl.uint8, is_pure=True, pack=4)
        low = low.to(low_dtype, bitcast=True)
    else:
        low = tl.clamp(low, -LIMIT, LIMIT).to(low_dtype)
    if ROWS:
        tl.store(rows_out + r.to(tl.int64)[:, None] * W + c[None, :], low, mask=inside)
    if COLUMNS:
        at = columns_out + c.to(tl.int64)[:, None] * rows + r[None, :]
        tl.store(at, tl.trans(low), mask=tl.trans(inside))


@triton.jit
def _gelu_forward(x, bias, scale, amax, inverse, rows_out, columns_out, rows,
                  W: tl.constexpr, LIMIT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                  BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    tiles: tl.constexpr = (W + BC - 1) // BC  # one axis for all programs: a second one ends at 65,535
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    if tl.program_id(0) == 0:
        tl.store(inverse, 1.0 / tl.load(scale))
    inside = (r < rows)[:, None] & (c < W)[None, :]
    a = tl.load(x + r.to(tl.int64)[:, None] * W + c[None, :], mask=inside, other=0.0)
    if GPU and a.dtype == tl.bfloat16:
        a = tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [a], tl.float32, is_pure=True, pack=2)
    a = a.to(tl.float32)
    a += tl.load(bias + c, mask=c < W, other=0.0).to(tl.float32)[None, :]
    y = tl.where(inside, triton_pieces.gelu(a, GPU), 0.0)
    _store(y, scale, amax, rows_out, columns_out, r, c, rows, W, LIMIT, COLUMNS, ROWS)


@triton.jit
def _gelu_backward(dy, x, bias, scale, amax, inverse, rows_out, columns_out, sums, rows,
                   W: tl.constexpr, LIMIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(inverse, 1.0 / tl.load(scale))
    inside = (r < rows)[:, None] & (c < W)[None, :]
    at = r.to(tl.int64)[:, None] * W + c[None, :]
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(bias + c, mask=c < W, other=0.0).to(tl.float32)[None, :]
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    grad = grad * triton_pieces.gelu_slope(a, GPU)
    tl.store(sums + tl.program_id(1).to(tl.int64) * W + c, tl.sum(grad, 0), mask=c < W)
    _store(grad, scale, amax, rows_out, columns_out, r, c, rows, W, LIMIT, True)


@triton.jit
def _norm(x, y, bias, weight, shift, total, scale, amax, inverse, rows_out, rows, eps,
          D: tl.constexpr, LIMIT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
          BR: tl.constexpr):  # fmt: skip
    c = tl.arange(0, BLOCK)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) == 0:
        tl.store(inverse, 1.0 / tl.load(scale))
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
    _store(a, scale, amax, rows_out, None, r, c, rows, D, LIMIT, False)


TILE = {"BR": 128, "BC": 64, "num_warps": 8}  # with both directions: 128 bytes in a row of columns
FLAT = {"BR": 8, "BC": 512, "num_warps": 8}  # without columns
ROW = {"BR": 1, "num_warps": 1}  # a warp a row: its sums need no barrier


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
    out, (number, width) = _empty(x, dtype, columns, rows), x.shape
    tile = TILE if columns else FLAT
    grid = (triton.cdiv(width, tile["BC"]) * triton.cdiv(number, tile["BR"]),)
    _gelu_forward[grid](
        x, bias, scale, amax, out.inverse, out.rows, out.columns, number,
        W=width, LIMIT=torch.finfo(dtype).max, COLUMNS=columns, ROWS=rows, **tile,
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
    out, (rows, width) = _empty(x, dtype, True), x.shape
    grid = (triton.cdiv(width, TILE["BC"]), triton.cdiv(rows, TILE["BR"]))
    sums = torch.empty(grid[1], width, dtype=torch.float32, device=x.device)
    _gelu_backward[grid](
        dy, x, bias, scale, amax, out.inverse, out.rows, out.columns, sums, rows,
        W=width, LIMIT=torch.finfo(dtype).max, **TILE,
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
    out, (rows, width), block = _empty(x, dtype, False), x.shape, triton.next_power_of_2(x.shape[-1])
    total = x if y is None else torch.empty_like(x)
    _norm[(triton.cdiv(rows, ROW["BR"]),)](
        x, y, bias, weight, shift, total, scale, amax, out.inverse, out.rows, rows, eps,
        D=width, LIMIT=torch.finfo(dtype).max, ADD=y is not None, BLOCK=block, **ROW,
    )  # fmt: skip
    return total, out


def _empty(x: Tensor, dtype: torch.dtype, columns: bool, rows: bool = True) -> Scaled:
    return Scaled(
        torch.empty_like(x, dtype=dtype) if rows else None,
        torch.empty(x.shape[::-1], dtype=dtype, device=x.device) if columns else None,
        torch.empty(1, dtype=torch.float32, device=x.device),
    )


def _scaled(y: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype, columns: bool) -> Scaled:
    """The reference: fp32 `y` as the kernels store it."""
    amax.copy_(torch.maximum(amax, y.abs().max()))
    limit = torch.finfo(dtype).max
    low = (y * scale).clamp(-limit, limit).to(dtype)
    return Scaled(low, low.t().contiguous() if columns else None, scale.reciprocal().reshape(1))
