"""Pieces between matrix products that inductor makes several kernels of, each one kernel in Triton.

On a GPU these pieces only move memory, so what counts is how often a tensor is read and written:

    gelu    with bias; the backward pass adds up the bias's gradient while it has the numbers.
    norm    backward: adds the gradient that comes past it on the residual, and adds up those of weight, bias,
            and of the bias of the linear before.
    moments of channels over all tokens, in one pass (training/monitors.py).
    turn    rotary positions in place, so that values are not copied; the backward pass writes the gradient
            of the packed heads at once. Heads are read and written as whole vectors.

Sums over tokens are first taken over shares of them, and those then added in a fixed order: the same numbers
every time. models/fused.py has the functions that these stand for, and calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARE = 128  # rows whose sum one program of GELU's backward pass takes
MOMENTS_SHARE = 512  # rows of a program that takes moments
NORM_PROGRAMS = 4  # of the norm's backward pass a multiprocessor holds at once
# Of rotary turns: tokens of a program, its heads at most, and how many of them load at once. A thread has one
# vector of 8 values of each part, so that a multiprocessor of an H100 holds 24 warps or more.
TURN_TOKENS, TURN_HEADS, TURN_STAGES = 16, 8, 1
PTX = not triton.knobs.runtime.interpret


@triton.jit
def quick(denominator, exponent, PTX: tl.constexpr):
    """1 / denominator, and 2 to the power of exponent."""
    if PTX:  # one instruction each; tl.exp2 and / take care of numbers that do not occur here
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse, power = 1.0 / denominator, tl.exp2(exponent)
    return inverse, power


@triton.jit
def _tail(x, PTX: tl.constexpr):
    """The normal distribution function of -|x|, and exp(-x^2 / 2).

    erfc(z) = exp(-z^2) times a polynomial in 1 / (1 + 0.51 z), fitted to a relative error of 9e-7 for z >= 0:
    a third of the instructions of erf, and the exponential is the density that the derivative needs.
    """
    denominator = 1.0 + 0.36062445840513924 * tl.abs(x)
    t, bell = quick(denominator, x * x * -0.7213475204444817, PTX)
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
    tiles: tl.constexpr = (W + BC - 1) // BC  # one axis for all programs: a second one ends at 65,535
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    r = tl.program_id(0) // tiles * BR + tl.arange(0, BR)
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
def _moments(x, out, rows, share, W: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Count, means and squared deviations of `share` rows: of a lane as its rows come, then of all lanes."""
    tiles: tl.constexpr = (W + BC - 1) // BC
    c, lane = tl.program_id(0) % tiles * BC + tl.arange(0, BC), tl.arange(0, BR)
    part = tl.program_id(0) // tiles
    number = tl.minimum(rows - part * share, share)
    level = tl.zeros([BR, BC], tl.float32)
    spread = tl.zeros([BR, BC], tl.float32)
    step = 0
    while step * BR < number:
        r = step * BR + lane
        inside = (r < number)[:, None] & (c < W)[None, :]
        at = (part * share + r).to(tl.int64)[:, None] * W + c[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, a - level, 0.0)
        level += apart / (step + 1)
        spread += tl.where(inside, apart * (a - level), 0.0)
        step += 1
    count = tl.maximum((number - lane + BR - 1) // BR, 0).to(tl.float32)[:, None]
    mean = tl.sum(level * count, 0) / number
    apart = level - mean[None, :]
    to = out + part.to(tl.int64) * (1 + 2 * W)
    tl.store(to + 1 + c, mean, mask=c < W)
    tl.store(to + 1 + W + c, tl.sum(spread + count * apart * apart, 0), mask=c < W)
    if tl.program_id(0) % tiles == 0:
        tl.store(to, number.to(tl.float32))


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
def _turned(x, c, s, swap, kept):
    """Heads x [BT, BD]: x * cos + partner * sin, and what is `kept` as it was.

    The partners come from a product with ones and zeros, which is exact: they lie HALF dimensions away, where
    no load of whole vectors would find them.
    """
    partner = tl.dot(x.to(swap.dtype), swap, input_precision="ieee").to(x.dtype)
    return tl.where(kept, x, (x.to(tl.float32) * c + partner.to(tl.float32) * s).to(x.dtype))


@triton.jit
def _turn(
    q, k, v, packed, cos, sin, tokens,
    A: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    HEADS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """In `packed`, whose parts q, k and v are; back: from gradients of their own, by -angle, and copies of v.

    A program turns HEADS heads of BT tokens, whose cosines and sines it reads once.
    """
    shares = (A + HEADS - 1) // HEADS
    t = (tl.program_id(0) // shares).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    d = tl.arange(0, BD)
    low = d < HALF
    partner = tl.where(low, d + HALF, d - HALF)
    # Triton's interpreter multiplies the bits of bf16 as if they were integers
    swap = (d[:, None] == partner[None, :]).to(packed.dtype.element_ty if PTX else tl.float32)
    inside = (t < tokens) & (d < D)[None, :]
    kept = (d >= 2 * HALF)[None, :]
    angle = t * HALF + tl.where(low, d, d - HALF)[None, :]
    c = tl.load(cos + angle, mask=inside & (kept == 0), other=0.0)
    s = tl.load(sin + angle, mask=inside & (kept == 0), other=0.0)
    s = tl.where(low[None, :] == BACK, s, -s)
    for i in range(HEADS):
        head = tl.program_id(0) % shares * HEADS + i
        there = inside & (head < A)
        at = (t * A + head) * (D if BACK else PARTS * D) + d[None, :]
        to = packed + (t * A + head) * (PARTS * D) + d[None, :]
        # all loads before the first store, which the compiler leaves in their order
        x = tl.load(q + at, mask=there, other=0.0)
        if PARTS == 3:
            y = tl.load(k + at, mask=there, other=0.0)
        if BACK and PARTS > 1:
            tl.store(to + (PARTS - 1) * D, tl.load(v + at, mask=there, other=0.0), mask=there)
        tl.store(to, _turned(x, c, s, swap, kept), mask=there)
        if PARTS == 3:
            tl.store(to + D, _turned(y, c, s, swap, kept), mask=there)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def sum_of(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, W] -> [W]."""
    parts, width = sums.shape
    out = torch.empty(width, dtype=dtype, device=sums.device)
    _add_up[(triton.cdiv(width, 32),)](sums, out, parts, W=width, BP=128, BC=32)
    return out


def moments(x: Tensor) -> Tensor:
    """Of shares of x's rows [N, W]: count, means and squared deviations, fp32 [shares, 1 + 2 W]."""
    x, (rows, width) = x.contiguous(), x.shape
    parts = triton.cdiv(rows, MOMENTS_SHARE)
    out = torch.empty(parts, 1 + 2 * width, dtype=torch.float32, device=x.device)
    _moments[(parts * triton.cdiv(width, 64),)](x, out, rows, MOMENTS_SHARE, W=width, BR=16, BC=64)
    return out


class BiasGelu(torch.autograd.Function):
    """Exact GELU of x [N, W] + bias [W]."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        rows, width = x.shape
        grid = (triton.cdiv(width, 256) * triton.cdiv(rows, 8),)
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
    programs = NORM_PROGRAMS * processors(x.device)
    share = at_once * triton.cdiv(rows, at_once * programs)
    parts = triton.cdiv(rows, share)
    dx = torch.empty_like(x)
    sums = torch.empty(parts, (3 if linear else 2) * width, dtype=torch.float32, device=x.device)
    _norm_backward[(parts,)](
        dnormed.contiguous(), dpast.contiguous(), x.contiguous(), mean, rstd, weight, dx, sums, rows, share,
        D=width, BLOCK=block, BR=at_once, LINEAR=linear,
    )  # fmt: skip
    return dx, *sum_of(sums, weight.dtype).split(width)


def turn(parts: Sequence[Tensor], packed: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Turn the parts [q, k, v], [k, v] or [q], [N, A, d] each, of packed [N, A, parts, d].

    back: they are contiguous gradients, and packed is written.
    """
    tokens, heads, count, width = packed.shape
    block = max(16, triton.next_power_of_2(width))  # no matrix product is narrower
    shares = triton.cdiv(heads, TURN_HEADS)
    _turn[(triton.cdiv(tokens, TURN_TOKENS) * shares,)](
        parts[0], parts[min(1, count - 1)], parts[-1], packed, cos, sin, tokens,
        A=heads, D=width, PARTS=count, HALF=cos.shape[1], BACK=back,
        HEADS=triton.cdiv(heads, shares), BD=block, BT=TURN_TOKENS, PTX=PTX,
        num_warps=max(1, TURN_TOKENS * block // 256), num_stages=TURN_STAGES,
    )  # fmt: skip


class Turn(torch.autograd.Function):
    """[N, A * parts * d] -> `parts` views [N, A, d] of the same memory, queries and keys turned."""

    @staticmethod
    def forward(ctx, packed: Tensor, cos: Tensor, sin: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        packed = packed.view(len(cos), heads, parts, -1)
        found = packed.unbind(2)
        turn(found, packed, cos, sin, back=False)
        return found

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, heads, width = grads[0].shape
        dpacked = grads[0].new_empty(tokens, heads, len(grads), width)
        turn([x.contiguous() for x in grads], dpacked, *ctx.saved_tensors, back=True)
        return dpacked.flatten(1), None, None, None, None
