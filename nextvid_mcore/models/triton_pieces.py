"""Pieces between matrix products that inductor makes several kernels of, each one kernel in Triton.

On a GPU these pieces only move memory, so what counts is how often a tensor is read and written:

    gelu    with bias; the backward pass adds up the bias's gradient while it has the numbers.
    norm    backward: adds the gradient that comes past it on the residual, and adds up those of weight, bias,
            and of the bias of the linear before.
    turn    rotary positions in place, so that values are not copied; the backward pass writes the gradient
            of the packed heads at once.

Sums over tokens are first taken over shares of them, and those then added in a fixed order: the same numbers
every time. models/fused.py has the functions that these stand for, and calls them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARE = 128  # rows whose sum one program of GELU's backward pass takes
NORM_PROGRAMS = 4  # of the norm's backward pass a multiprocessor holds at once
PTX = not triton.knobs.runtime.interpret


@triton.jit
def _tail(x, PTX: tl.constexpr):
    """The normal distribution function of -|x|, and exp(-x^2 / 2).

    erfc(z) = exp(-z^2) times a polynomial in 1 / (1 + 0.51 z), fitted to a relative error of 9e-7 for z >= 0:
    a third of the instructions of erf, and the exponential is the density that the derivative needs.
    """
    denominator = 1.0 + 0.36062445840513924 * tl.abs(x)
    exponent = x * x * -0.7213475204444817  # of 2
    if PTX:  # one instruction each; tl.exp2 and / take care of numbers that do not occur here
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
        bell = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t, bell = 1.0 / denominator, tl.exp2(exponent)
    p = 0.04725342995
    p = p * t - 0.1795792285
    p = p * t + 0.1792388245
    p = p * t + 0.02751549845
    p = p * t + 0.1395370085
    p = p * t + 0.142075448
    p = p * t + 0.1439588005
    return p * t * bell, bell


@triton.jit
def gelu(a, PTX: tl.constexpr):
    tail, _ = _tail(a, PTX)
    return tl.maximum(a, 0.0) - tl.abs(a) * tail


@triton.jit
def gelu_slope(a, PTX: tl.constexpr):
    tail, bell = _tail(a, PTX)
    return tl.where(a < 0, tail, 1.0 - tail) + a * bell * 0.3989422804014327


@triton.jit
def _gelu_forward(x, bias, y, rows, W: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PTX: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    at = r.to(tl.int64)[:, None] * W + c[None, :]
    inside = (r < rows)[:, None]
    if W % BC != 0:
        inside = inside & (c < W)[None, :]
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(bias + c, mask=c < W, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, gelu(a, PTX), mask=inside)


@triton.jit
def _gelu_backward(
    dy, x, bias, dx, sums, rows,
    SHARE: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    b = tl.load(bias + c, mask=c < W, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BR, BC], tl.float32)
    for step in range(0, SHARE, BR):
        r = tl.program_id(1) * SHARE + step + tl.arange(0, BR)
        at = r.to(tl.int64)[:, None] * W + c[None, :]
        inside = (r < rows)[:, None]
        if W % BC != 0:
            inside = inside & (c < W)[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + b
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        grad = grad * gelu_slope(a, PTX)
        tl.store(dx + at, grad, mask=inside)
        total += grad
    tl.store(sums + tl.program_id(1).to(tl.int64) * W + c, tl.sum(total, 0), mask=c < W)


@triton.jit
def _norm_backward(
    dn, dpast, x, mean, rstd, weight, dx, sums, rows, share,
    D: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BR, BLOCK], tl.float32)
    db = tl.zeros([BR, BLOCK], tl.float32)
    dl = tl.zeros([BR, BLOCK], tl.float32)
    step = 0
    while step < share:
        r = tl.program_id(0) * share + step + tl.arange(0, BR)
        there = r < rows
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        inside = there[:, None] & (c < D)[None, :]
        grad = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        past = tl.load(dpast + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + r, mask=there, other=0.0)[:, None]
        s = tl.load(rstd + r, mask=there, other=0.0)[:, None]
        normed = tl.where(inside, (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m) * s, 0.0)
        scaled = grad * w
        along = tl.sum(scaled * normed, 1)[:, None] / D
        level = tl.sum(scaled, 1)[:, None] / D
        out = tl.where(inside, past + (scaled - level - normed * along) * s, 0.0)
        tl.store(dx + at, out, mask=inside)
        dw += grad * normed
        db += grad
        if LINEAR:
            dl += out
        step += BR
    width = 3 if LINEAR else 2
    to = sums + tl.program_id(0).to(tl.int64) * width * D + c
    tl.store(to, tl.sum(dw, 0), mask=c < D)
    tl.store(to + D, tl.sum(db, 0), mask=c < D)
    if LINEAR:
        tl.store(to + 2 * D, tl.sum(dl, 0), mask=c < D)


@triton.jit
def _add_up(sums, out, parts, W: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BP, BC], tl.float32)
    first = 0
    while first < parts:
        p = first + tl.arange(0, BP)
        inside = (p < parts)[:, None] & (c < W)[None, :]
        total += tl.load(sums + p.to(tl.int64)[:, None] * W + c[None, :], mask=inside, other=0.0)
        first += BP
    tl.store(out + c, tl.sum(total, 0), mask=c < W)


@triton.jit
def _turn(
    packed, cos, sin, rows,
    A: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BR + tl.arange(0, BR)  # a head of a token
    i = tl.arange(0, BH)
    inside = (r < rows)[:, None] & (i < HALF)[None, :]
    angle = (r // A).to(tl.int64)[:, None] * HALF + i[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    at = packed + r.to(tl.int64)[:, None] * (PARTS * D) + i[None, :]
    for part in tl.static_range(2 if PARTS == 3 else 1):
        first = tl.load(at + part * D, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + part * D + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(at + part * D, first * c - second * s, mask=inside)
        tl.store(at + part * D + HALF, second * c + first * s, mask=inside)


@triton.jit
def _turn_back(
    dq, dk, dv, dpacked, cos, sin, rows,
    A: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    i = tl.arange(0, BH)
    there = (r < rows)[:, None]
    inside = there & (i < HALF)[None, :]
    angle = (r // A).to(tl.int64)[:, None] * HALF + i[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    r = r.to(tl.int64)[:, None]
    for part in tl.static_range(2 if PARTS == 3 else 1):
        of = dq + r * D if part == 0 else dk + r * D
        to = dpacked + r * (PARTS * D) + part * D
        first = tl.load(of + i[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(of + HALF + i[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(to + i[None, :], first * c + second * s, mask=inside)
        tl.store(to + HALF + i[None, :], second * c - first * s, mask=inside)
        if D > 2 * HALF:  # dimensions that are not turned
            rest = 2 * HALF + tl.arange(0, BT)[None, :]
            tl.store(
                to + rest, tl.load(of + rest, mask=there & (rest < D), other=0.0), mask=there & (rest < D)
            )
    if PARTS > 1:
        d = tl.arange(0, BD)[None, :]
        value = tl.load(dv + r * D + d, mask=there & (d < D), other=0.0)
        tl.store(dpacked + r * (PARTS * D) + (PARTS - 1) * D + d, value, mask=there & (d < D))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def sum_of(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, W] -> [W]."""
    parts, width = sums.shape
    out = torch.empty(width, dtype=dtype, device=sums.device)
    _add_up[(triton.cdiv(width, 32),)](sums, out, parts, W=width, BP=128, BC=32)
    return out


class BiasGelu(torch.autograd.Function):
    """Exact GELU of x [N, W] + bias [W]."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        rows, width = x.shape
        grid = (triton.cdiv(width, 256), triton.cdiv(rows, 8))
        _gelu_forward[grid](x, bias, y, rows, W=width, BR=8, BC=256, PTX=PTX)
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        rows, width = x.shape
        dx, parts = torch.empty_like(x), triton.cdiv(rows, SHARE)
        sums = torch.empty(parts, width, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(width, 256), parts)
        _gelu_backward[grid](
            dy.contiguous(), x, bias, dx, sums, rows, SHARE=SHARE, W=width, BR=8, BC=256, PTX=PTX
        )
        return dx, sum_of(sums, bias.dtype)


def norm_backward(
    dnormed: Tensor, dpast: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, linear: bool
) -> tuple[Tensor, ...]:
    """Gradients of LayerNorm's input x [N, D] (with `dpast`, which came past the norm), weight and bias.

    linear: of a bias too that was added to the input.
    """
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    at_once = max(1, 2048 // block)
    programs = NORM_PROGRAMS * _processors(x.device)
    share = at_once * triton.cdiv(rows, at_once * programs)
    parts = triton.cdiv(rows, share)
    dx = torch.empty_like(x)
    sums = torch.empty(parts, (3 if linear else 2) * width, dtype=torch.float32, device=x.device)
    _norm_backward[(parts,)](
        dnormed.contiguous(), dpast.contiguous(), x.contiguous(), mean, rstd, weight, dx, sums, rows, share,
        D=width, BLOCK=block, BR=at_once, LINEAR=linear,
    )  # fmt: skip
    return dx, *sum_of(sums, weight.dtype).split(width)


class Turn(torch.autograd.Function):
    """[N, A * parts * d] -> `parts` views [N, A, d] of the same memory, queries and keys turned."""

    @staticmethod
    def forward(ctx, packed: Tensor, cos: Tensor, sin: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
        tokens, half = cos.shape
        width = packed.shape[-1] // (heads * parts)
        ctx.sizes = sizes = {
            "A": heads, "D": width, "PARTS": parts, "HALF": half, "BH": triton.next_power_of_2(half)
        }  # fmt: skip
        rows = tokens * heads
        _turn[(triton.cdiv(rows, 64),)](packed, cos, sin, rows, **sizes, BR=64)
        ctx.save_for_backward(cos, sin)
        return packed.view(tokens, heads, parts, width).unbind(2)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, width, half = (ctx.sizes[name] for name in ("A", "D", "HALF"))
        parts, rows = len(grads), len(cos) * heads
        dpacked = grads[0].new_empty(len(cos), heads * parts * width)
        grads = [x.contiguous() for x in grads]
        dq, dk, dv = grads[0], grads[min(1, parts - 1)], grads[-1]
        _turn_back[(triton.cdiv(rows, 64),)](
            dq, dk, dv, dpacked, cos, sin, rows, **ctx.sizes,
            BT=triton.next_power_of_2(max(1, width - 2 * half)), BD=triton.next_power_of_2(width), BR=64,
        )  # fmt: skip
        return dpacked, None, None, None, None
