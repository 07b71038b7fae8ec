"""AdaLN's elementwise work, a kernel in Triton each way: what stands between two branches of a DiT layer.

    forward     x + gate * (y + bias) on the residual stream, and its LayerNorm without parameters,
                times 1 + scale, plus shift: two tensors are read and two written
    backward    gradients of the residual and of y from those of both, and all sums: four read, two written

Gate, shift and scale are one vector a row (a frame at one tau); a program has one row, and keeps its vectors
while it goes through a share of the row's tokens, a warp a token. Gradients of the vectors are sums over the
tokens that are here, so under sequence parallelism over a rank's share, as those of all that tokens share.
Sums are written share by share and then added in a fixed order: the same numbers every time. models/fused.py
has the functions that this stands for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nextvid_mcore.models import triton_pieces

WIDEST = 512  # values of a token: a program keeps four sums of each in registers
WARPS = 4  # of a program, each with a token at a time
FORWARD_TOKENS = 16  # of a program
AT_ONCE, REGISTERS = 4, 128  # programs of the backward pass on a multiprocessor; of a thread
LEAST, EXTRA = 8, 5  # tokens of such a program; those that its start and its warps' sums take the time of
GATHERED_ROWS = 8


@triton.jit
def _token(base, start, there, D: tl.constexpr, BC: tl.constexpr):
    """Values [BT, D] that begin at `start`, in pieces of BC columns; 0 where no token is `there`."""
    found = ()
    for first in tl.static_range(0, D, BC):
        c = first + tl.arange(0, BC)
        inside = there[:, None]
        if D - first < BC:
            inside = inside & (c < D)[None, :]
        found += (tl.load(base + start[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _vector(base, D: tl.constexpr, BC: tl.constexpr):
    """The same of one vector [D]."""
    found = ()
    for first in tl.static_range(0, D, BC):
        c = first + tl.arange(0, BC)
        found += (tl.load(base + c, mask=c < D, other=0.0).to(tl.float32)[None, :],)
    return found


@triton.jit
def _adaln_forward(
    x, y, bias, gate, shift, scale, total, normed, mean, rstd, tokens, rows, gate_stride, stride, eps,
    SHARE: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) % rows
    shifts, scales = _vector(shift + row * stride, D, BC), _vector(scale + row * stride, D, BC)
    if ADD:
        gates, biases = _vector(gate + row * gate_stride, D, BC), _vector(bias, D, BC)
    for step in range(0, SHARE, BT):
        t = tl.program_id(0) // rows * SHARE + step + tl.arange(0, BT)
        there = t < tokens
        number = t.to(tl.int64) * rows + row
        values = _token(x, number * D, there, D, BC)
        if ADD:
            branch, added = _token(y, number * D, there, D, BC), ()
            for i in tl.static_range(len(values)):
                a = values[i] + gates[i] * (branch[i] + biases[i])
                a = a.to(total.dtype.element_ty)  # the norm is of what the residual stream keeps
                c = i * BC + tl.arange(0, BC)
                tl.store(total + number[:, None] * D + c[None, :], a, mask=there[:, None] & (c < D)[None, :])
                added += (a.to(tl.float32),)
            values = added
        level = values[0]
        for i in tl.static_range(1, len(values)):
            level += values[i]
        level = tl.sum(level, 1) / D
        spread, apart = tl.zeros([BT, BC], tl.float32), ()
        for i in tl.static_range(len(values)):
            a = values[i] - level[:, None]
            if D - i * BC < BC:
                a = tl.where((i * BC + tl.arange(0, BC) < D)[None, :], a, 0.0)
            spread += a * a
            apart += (a,)
        deviation = 1.0 / tl.sqrt(tl.sum(spread, 1) / D + eps)
        tl.store(mean + number, level, mask=there)
        tl.store(rstd + number, deviation, mask=there)
        for i in tl.static_range(len(values)):
            c = i * BC + tl.arange(0, BC)
            a = apart[i] * deviation[:, None] * (1.0 + scales[i]) + shifts[i]
            tl.store(normed + number[:, None] * D + c[None, :], a, mask=there[:, None] & (c < D)[None, :])


@triton.jit
def _adaln_backward(
    dnormed, dpast, total, y, gate, scale, mean, rstd, dx, dy, sums, tokens, rows, gate_stride, stride, share,
    D: tl.constexpr, ADD: tl.constexpr, PAST: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of a share, [4 or 2, D]: of dnormed, of it times the norm; of dx, of it times y."""
    row = tl.program_id(0) % rows
    scales = _vector(scale + row * stride, D, BC)
    dshift = ()
    for _ in tl.static_range(0, D, BC):
        dshift += (tl.zeros([BT, BC], tl.float32),)
    dscale, plain, along_y = dshift, dshift, dshift
    if ADD:
        gates = _vector(gate + row * gate_stride, D, BC)
    step = 0
    while step < share:
        t = tl.program_id(0) // rows * share + step + tl.arange(0, BT)
        there = t < tokens
        number = t.to(tl.int64) * rows + row
        grads, values = _token(dnormed, number * D, there, D, BC), _token(total, number * D, there, D, BC)
        if PAST:
            past = _token(dpast, number * D, there, D, BC)
        if ADD:
            branch = _token(y, number * D, there, D, BC)
        level = tl.load(mean + number, mask=there, other=0.0)[:, None]
        deviation = tl.load(rstd + number, mask=there, other=0.0)[:, None]
        # columns beyond D have no gradient, and what they have else is not stored
        along, mid = tl.zeros([BT, BC], tl.float32), tl.zeros([BT, BC], tl.float32)
        norms, scaled, shifts_sum, scales_sum = (), (), (), ()
        for i in tl.static_range(len(values)):
            a = (values[i] - level) * deviation
            b = grads[i] * (1.0 + scales[i])
            along += a * b
            mid += b
            norms += (a,)
            scaled += (b,)
            shifts_sum += (dshift[i] + grads[i],)
            scales_sum += (dscale[i] + grads[i] * a,)
        dshift, dscale = shifts_sum, scales_sum
        along, mid = (tl.sum(along, 1) / D)[:, None], (tl.sum(mid, 1) / D)[:, None]
        sums_x, with_y = (), ()
        for i in tl.static_range(len(values)):
            c = i * BC + tl.arange(0, BC)
            inside = there[:, None] & (c < D)[None, :]
            a = (scaled[i] - mid - norms[i] * along) * deviation
            if PAST:
                a += past[i]
            tl.store(dx + number[:, None] * D + c[None, :], a, mask=inside)
            if ADD:
                tl.store(dy + number[:, None] * D + c[None, :], a * gates[i], mask=inside)
                with_y += (along_y[i] + a * branch[i],)
                sums_x += (plain[i] + a,)
        if ADD:
            plain, along_y = sums_x, with_y
        step += BT
    to = sums + tl.program_id(0).to(tl.int64) * ((4 if ADD else 2) * D)
    for i in tl.static_range(len(dshift)):
        c = i * BC + tl.arange(0, BC)
        tl.store(to + c, tl.sum(dshift[i], 0), mask=c < D)
        tl.store(to + D + c, tl.sum(dscale[i], 0), mask=c < D)
        if ADD:
            tl.store(to + 2 * D + c, tl.sum(plain[i], 0), mask=c < D)
            tl.store(to + 3 * D + c, tl.sum(along_y[i], 0), mask=c < D)


@triton.jit
def _adaln_gather(
    sums, gate, bias, dshift, dscale, dgate, biases, rows, shares, gate_stride,
    D: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Shares' sums added up for BR rows and BC columns; of the bias's gradient, the share of these rows."""
    K: tl.constexpr = 4 if ADD else 2
    tiles: tl.constexpr = (D + BC - 1) // BC
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
    inside = (r < rows)[:, None] & (c < D)[None, :]
    shifts, scales = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    plain, along = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    share = 0
    while share < shares:
        at = sums + (share * rows + r).to(tl.int64)[:, None] * (K * D) + c[None, :]
        shifts += tl.load(at, mask=inside, other=0.0)
        scales += tl.load(at + D, mask=inside, other=0.0)
        if ADD:
            plain += tl.load(at + 2 * D, mask=inside, other=0.0)
            along += tl.load(at + 3 * D, mask=inside, other=0.0)
        share += 1
    to = r.to(tl.int64)[:, None] * D + c[None, :]
    tl.store(dshift + to, shifts, mask=inside)
    tl.store(dscale + to, scales, mask=inside)
    if ADD:
        b = tl.load(bias + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        tl.store(dgate + to, along + b * plain, mask=inside)
        g = tl.load(gate + r.to(tl.int64)[:, None] * gate_stride + c[None, :], mask=inside, other=0.0)
        tl.store(
            biases + (tl.program_id(0) // tiles).to(tl.int64) * D + c,
            tl.sum(plain * g.to(tl.float32), 0),
            mask=c < D,
        )


def fits(x: Tensor) -> bool:
    """Whether tokens [s, rows, E] are narrow enough."""
    return x.shape[-1] <= WIDEST


def _tile(width: int) -> dict[str, int]:
    return {"D": width, "BT": WARPS, "BC": min(128, triton.next_power_of_2(width)), "num_warps": WARPS}


def _rows(vector: Tensor) -> tuple[Tensor, int]:
    """[1, rows, E], its values side by side, and how far rows are apart."""
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    return vector, vector.stride(1)


def _alike(shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both with their rows equally far apart, and how far."""
    (shift, stride), (scale, other) = _rows(shift), _rows(scale)
    if stride != other:
        shift, scale, stride = shift.contiguous(), scale.contiguous(), shift.shape[-1]
    return shift, scale, stride


def forward(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [s, rows, E] (+ gate * (y + bias)), its norm * (1 + scale) + shift, mean and 1 / deviation.

    The vectors are [1, rows, E].
    """
    s, rows, width = x.shape
    x, (shift, scale, stride) = x.contiguous(), _alike(shift, scale)
    total, gate_stride = x, 0
    if y is not None:
        y, total, (gate, gate_stride) = y.contiguous(), torch.empty_like(x), _rows(gate)
    normed = torch.empty_like(x)
    mean, rstd = torch.empty(2, s * rows, dtype=torch.float32, device=x.device)
    _adaln_forward[(rows * triton.cdiv(s, FORWARD_TOKENS),)](
        x, y, bias, gate, shift, scale, total, normed, mean, rstd, s, rows, gate_stride, stride, eps,
        SHARE=FORWARD_TOKENS, ADD=y is not None, **_tile(width),
    )  # fmt: skip
    return total, normed, mean, rstd


class GatedNorm(torch.autograd.Function):
    """`forward`, and `backward` to all that it was given."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        _, y, bias, gate, _, scale, _ = given
        ctx.set_materialize_grads(False)
        total, normed, mean, rstd = forward(*given)
        ctx.save_for_backward(total, y, bias, gate, scale, mean, rstd)
        return total, normed

    @staticmethod
    def backward(ctx: Any, dpast: Tensor | None, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dnormed, dpast, *ctx.saved_tensors), None


@functools.cache
def share_of(s: int, rows: int, device: torch.device) -> int:
    """Tokens of a program of the backward pass, those that take least time by rounds of programs.

    Few programs in one round have memory's whole speed too, up to what a program can take.
    """
    room = AT_ONCE * triton_pieces.processors(device)

    def time(share: int) -> float:
        rounds = triton.cdiv(rows * triton.cdiv(s, share), room)
        return rounds * (share + EXTRA) if rounds > 1 else max(rows * s / room, share / 1.5) + EXTRA

    return min((WARPS * triton.cdiv(s, WARPS * n) for n in range(1, s // LEAST + 2)), key=time)


def backward(
    dnormed: Tensor,
    dpast: Tensor | None,
    total: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, bias, gate, shift and scale; `dpast` came past the norm."""
    (s, rows, width), added = total.shape, y is not None
    dnormed, dpast = dnormed.contiguous(), None if dpast is None else dpast.contiguous()
    share, tile = share_of(s, rows, total.device), _tile(width)
    shares = triton.cdiv(s, share)
    dx, dy = torch.empty_like(total), torch.empty_like(y) if added else None
    sums = scale.new_empty(shares, rows, 4 if added else 2, width, dtype=torch.float32)
    gate, gate_stride = _rows(gate) if added else (None, 0)
    scale, stride = _rows(scale)
    _adaln_backward[(rows * shares,)](
        dnormed, dpast, total, y, gate, scale, mean, rstd, dx, dy, sums, s, rows, gate_stride, stride, share,
        ADD=added, PAST=dpast is not None, **tile, **({"maxnreg": REGISTERS} if width <= 384 else {}),
    )  # fmt: skip
    blocks = triton.cdiv(rows, GATHERED_ROWS)
    found = scale.new_empty(3 if added else 2, 1, rows, width)
    biases = sums.new_empty(blocks, width) if added else None
    _adaln_gather[(blocks * triton.cdiv(width, tile["BC"]),)](
        sums, gate, bias, found[0], found[1], found[-1], biases, rows, shares, gate_stride,
        D=width, ADD=added, BR=GATHERED_ROWS, BC=tile["BC"],
    )  # fmt: skip
    if not added:
        return dx, None, None, None, found[0], found[1]
    return dx, dy, triton_pieces.sum_of(biases, bias.dtype), found[2], found[0], found[1]
