"""What stands between the convolutions of VA-VAE's encoder, in Triton: it only moves memory.

    normalise   GroupNorm and SiLU of a sum, in one reading of it from memory. The programs of an image add
                up their slices, wait for each other, and read their slices again, which the L2 cache still
                has: few images are in flight at a time. Sums are added in a fixed order.
    add         a sum.

The sum is of up to two convolutions' outputs, their biases, and the first convolution of the frames, which is
not read but made again: a product of 27 (padded to 32) with 128 numbers a pixel costs less than the 16.8 MB
an image that it would have to be read from. Activations are [N, H, W, C], statistics fp32.
targets/fused_vae.py puts these together; targets/autoencoder.py is what they stand for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nextvid_mcore.targets.autoencoder import EPS, GROUPS

TAPS = 27  # of the first convolution: 3 x 3 of 3 colours
DEPTH = 32  # the power of two above it
PTX = not triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tuning:
    """How `normalise` is cut: numbers of a tile (of bf16) and of a slice (one program's share of an image),
    warps, programs a multiprocessor holds. `at_once`: one launch whose programs wait for each other, or two.
    """

    tile: int = 4096
    slice: int = 32768
    warps: int = 4
    programs: int = 4
    stages: int = 3
    at_once: bool = True


@triton.jit
def _silu_of_half(h, PTX: tl.constexpr):
    """SiLU of 2 h: h + h tanh(h). The instruction's tanh is off by 5e-4 of itself, which bf16 hides."""
    if PTX:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * h) + 1.0)
    return h + h * tanh


@triton.jit
def _summed(
    a, b, frames, first, bias, n, y, x, inside,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
    PARTS: tl.constexpr, FRAMES: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The sum [R, C] in fp32 at (y, x) [R] of image n; what is not `inside` means nothing."""
    c = tl.arange(0, C)[None, :]
    value = tl.zeros([R, C], tl.float32)
    if BIAS:
        value += tl.load(bias + c)
    at = n.to(tl.int64) * (H * W * C) + (y * W + x)[:, None] * C + c
    if PARTS > 0:
        value += tl.load(a + at, mask=inside[:, None], other=0.0).to(tl.float32)
    if PARTS > 1:
        value += tl.load(b + at, mask=inside[:, None], other=0.0).to(tl.float32)
    if FRAMES:
        t = tl.arange(0, DEPTH)
        row, column = t % 9 // 3 - 1, t % 3 - 1
        v, u = y[:, None] + row[None, :], x[:, None] + column[None, :]
        there = (v >= 0) & (v < H) & (u >= 0) & (u < W) & (t < 27)[None, :]
        where = (y * W + x)[:, None] + (t // 9 * (H * W) + row * W + column)[None, :]
        patch = tl.load(frames + n.to(tl.int64) * (3 * H * W) + where, mask=there, other=0.0)
        weight = tl.load(first + t[:, None] * C + c)
        if not PTX:  # Triton's interpreter multiplies the bits of bf16 as if they were integers
            patch, weight = patch.to(tl.float32), weight.to(tl.float32)
        value += tl.dot(patch, weight, input_precision="ieee")
    return value


@triton.jit
def _slice(
    a, b, frames, first, bias, kept, sums, n, k,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, SPAN: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr,
    FRAMES: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add up slice k of image n and its squares into sums [N, SLICES, 2, G]; store it if it is to be kept."""
    EVEN: tl.constexpr = H * W == SLICES * TILES * R
    c, g = tl.arange(0, C), tl.arange(0, G)
    total = tl.zeros([SPAN, C], tl.float32)
    square = tl.zeros([SPAN, C], tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        p = (k * TILES + i) * R + tl.arange(0, R)
        inside = (p < H * W) | EVEN
        v = _summed(
            a, b, frames, first, bias, n, p // W, p % W, inside, H, W, C, R, KEEP, PARTS, FRAMES, DEPTH, PTX
        )  # fmt: skip
        if KEEP:
            rounded = v.to(kept.dtype.element_ty)
            at = n.to(tl.int64) * (H * W * C) + p[:, None] * C + c[None, :]
            tl.store(kept + at, rounded, mask=inside[:, None])
            v = rounded.to(tl.float32)
        if not EVEN:
            v = tl.where(inside[:, None], v, 0.0)
        if SPAN == R:
            total += v
            square += v * v
        else:  # over a thread's own rows: nothing is exchanged
            v = tl.reshape(v, [R // SPAN, SPAN, C])
            total += tl.sum(v, 0)
            square += tl.sum(v * v, 0)
    total, square = tl.sum(total, 0), tl.sum(square, 0)
    if not KEEP:  # the bias, afterwards: with count positions, (v + b)^2 is v^2 + 2 b v + count b^2
        b = tl.load(bias + c)
        count = tl.maximum(tl.minimum(H * W - k * (TILES * R), TILES * R), 0).to(tl.float32)
        square += b * (2.0 * total + count * b)
        total += count * b
    to = sums + (n * SLICES + k) * (2 * G) + g
    tl.store(to, tl.sum(tl.reshape(total, [G, C // G]), 1))
    tl.store(to + G, tl.sum(tl.reshape(square, [G, C // G]), 1))


@triton.jit
def _line(
    sums, weight, shift, bias, n, eps,
    P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, SLICES: tl.constexpr, KEEP: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """What normalises image n: a number [C] to multiply with, and one to add. Kept sums have their bias, in
    others it is added here. SiLU wants half of both.
    """
    MORE: tl.constexpr = triton.next_power_of_2(SLICES)
    c, g, s = tl.arange(0, C), tl.arange(0, G), tl.arange(0, MORE)
    parts = sums + n * (SLICES * 2 * G) + s[:, None] * (2 * G) + g[None, :]
    there = (s < SLICES)[:, None] & (g >= 0)[None, :]
    mean = tl.sum(tl.load(parts, mask=there, other=0.0, cache_modifier=".cg"), 0) / (P * (C // G))
    spread = tl.sum(tl.load(parts + G, mask=there, other=0.0, cache_modifier=".cg"), 0) / (P * (C // G))
    scale = tl.rsqrt(tl.maximum(spread - mean * mean, 0.0) + eps)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], [G, C // G]), [C])
    scale *= tl.load(weight + c).to(tl.float32)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], [G, C // G]), [C])
    if not KEEP:
        mean -= tl.load(bias + c)
    start = tl.load(shift + c).to(tl.float32) - mean * scale
    if SILU:
        scale, start = 0.5 * scale, 0.5 * start
    return scale, start


@triton.jit
def _statistics(
    a, b, frames, first, bias, kept, sums, arrived, weight, shift, lines, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, SPAN: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr,
    FRAMES: tl.constexpr, KEEP: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
    DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Only what normalises each image, lines [N, 2, C]: an image's last program to be done writes it."""
    n = tl.program_id(0) // SLICES
    _slice(
        a, b, frames, first, bias, kept, sums, n, tl.program_id(0) % SLICES,
        H, W, C, G, R, TILES, SPAN, SLICES, PARTS, FRAMES, KEEP, STAGES, DEPTH, PTX,
    )  # fmt: skip
    tl.debug_barrier()  # all threads have stored before one says so
    if tl.atomic_add(arrived + n, 1, sem="acq_rel") == SLICES - 1:
        scale, start = _line(sums, weight, shift, bias, n, eps, H * W, C, G, SLICES, KEEP, SILU)
        c = tl.arange(0, C)
        tl.store(lines + n * (2 * C) + c, scale)
        tl.store(lines + n * (2 * C) + C + c, start)


@triton.jit
def _normalise(
    a, b, frames, first, bias, kept, sums, arrived, weight, shift, out, images, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, SPAN: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr,
    FRAMES: tl.constexpr, KEEP: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
    DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = H * W == SLICES * TILES * R
    k = tl.program_id(0) % SLICES
    n = tl.program_id(0) // SLICES
    while n < images:  # the interpreter has no range() over its numbers
        _slice(
            a, b, frames, first, bias, kept, sums, n, k,
            H, W, C, G, R, TILES, SPAN, SLICES, PARTS, FRAMES, KEEP, STAGES, DEPTH, PTX,
        )  # fmt: skip
        tl.debug_barrier()
        count = tl.atomic_add(arrived + n, 1, sem="acq_rel") + 1
        while count < SLICES:
            count = tl.atomic_add(arrived + n, 0, sem="acquire")
        tl.debug_barrier()
        scale, start = _line(sums, weight, shift, bias, n, eps, H * W, C, G, SLICES, KEEP, SILU)
        for j in tl.range(0, TILES, num_stages=STAGES):  # what was read last comes first
            p = (k * TILES + (TILES - 1 - j)) * R + tl.arange(0, R)
            inside = (p < H * W) | EVEN
            at = n.to(tl.int64) * (H * W * C) + p[:, None] * C + tl.arange(0, C)[None, :]
            if KEEP:
                v = tl.load(kept + at, mask=inside[:, None], other=0.0).to(tl.float32)
            else:
                v = _summed(
                    a, b, frames, first, bias, n, p // W, p % W, inside,
                    H, W, C, R, False, PARTS, FRAMES, DEPTH, PTX,
                )  # fmt: skip
            v = v * scale[None, :] + start[None, :]
            if SILU:
                v = _silu_of_half(v, PTX)
            tl.store(out + at, v, mask=inside[:, None])
        n += tl.num_programs(0) // SLICES


@triton.jit
def _write(
    a, b, frames, first, bias, lines, out,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    FRAMES: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The sum, normalised by `lines` or as it is."""
    tiles: tl.constexpr = (H * W + R - 1) // R
    EVEN: tl.constexpr = H * W == tiles * R
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * R + tl.arange(0, R)
    inside = (p < H * W) | EVEN
    c = tl.arange(0, C)[None, :]
    v = _summed(
        a, b, frames, first, bias, n, p // W, p % W, inside,
        H, W, C, R, not NORM, PARTS, FRAMES, DEPTH, PTX,
    )  # fmt: skip
    at = n.to(tl.int64) * (H * W * C) + p[:, None] * C + c
    if NORM:
        v = v * tl.load(lines + n * (2 * C) + c) + tl.load(lines + n * (2 * C) + C + c)
        if SILU:
            v = _silu_of_half(v, PTX)
    tl.store(out + at, v, mask=inside[:, None])


@dataclass(frozen=True)
class Sum:
    """bias [C] fp32 + up to two `parts` [N, H, W, C] + the first convolution of `frames` [N, 3, H, W]
    with `first` [32, C], its weights as a matrix (`matrix_of`)."""

    bias: Tensor
    parts: tuple[Tensor, ...] = ()
    frames: Tensor | None = None
    first: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, H, W, C."""
        if self.parts:
            return tuple(self.parts[0].shape)
        N, _, H, W = self.frames.shape
        return N, H, W, len(self.bias)

    @property
    def like(self) -> Tensor:
        return self.parts[0] if self.parts else self.frames

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        unused = self.bias
        a, b = (*self.parts, unused, unused)[:2]
        return a, b, *((unused, unused) if self.frames is None else (self.frames, self.first)), self.bias


def matrix_of(weight: Tensor) -> Tensor:
    """[C, 3, 3, 3] -> [32, C]: a row a colour and place of the window, five of zeros."""
    return torch.cat([weight.flatten(1).T, weight.new_zeros(DEPTH - TAPS, len(weight))]).contiguous()


@functools.cache
def _processors(device: torch.device) -> tuple[int, int]:
    """How many, and the shared memory of each."""
    if device.type != "cuda":
        return 2, 1 << 18  # of the interpreter
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor


def waiting(tuning: Tuning, tiles: int, ahead: int, device: torch.device) -> int:
    """Programs of `_normalise` that `device` runs at the same time: only so many may wait for each other.

    Of several tiles those to come lie in shared memory, `ahead` bytes with sums and the driver's. Registers
    are bounded by the launch.
    """
    processors, memory = _processors(device)
    return processors * (tuning.programs if tiles == 1 else min(tuning.programs, memory // ahead))


def normalise(
    x: Sum,
    weight: Tensor,
    bias: Tensor,
    arrived: Tensor,
    *,
    silu: bool = True,
    keep: bool = False,
    in_place: bool = False,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GroupNorm of x with weight and bias [C], and SiLU -> [N, H, W, C]; and x itself if it is to be kept.

    arrived: zeros [N], int32, for this call alone. in_place: into the memory of x's one part.
    """
    N, H, W, C = x.shape
    tuning = tuning or tuning_of(x)
    width = x.like.element_size()
    tile = min(max(16, tuning.tile * 2 // width // C), max(16, triton.next_power_of_2(H * W)))
    room = tuning.programs * _processors(x.like.device)[0]
    slices = triton.cdiv(H * W * C, max(min(tuning.slice, N * H * W * C // room), tile * C))
    tiles = triton.cdiv(H * W, slices * tile)
    slices = triton.cdiv(H * W, tiles * tile)
    kept = torch.empty(x.shape, dtype=x.like.dtype, device=x.like.device) if keep else None
    out = x.parts[0] if in_place else torch.empty(x.shape, dtype=x.like.dtype, device=x.like.device)
    sums = torch.empty(N, slices, 2, GROUPS, dtype=torch.float32, device=out.device)
    of = (*x.pointers(), out if kept is None else kept, sums, arrived, weight, bias)
    # a thread reads 16 bytes at once, so a program's threads have as many rows between them
    span = tile if x.frames is not None else min(tile, max(1, tuning.warps * 512 // width // C))
    shape = dict(
        H=H, W=W, C=C, G=GROUPS, R=tile, TILES=tiles, SPAN=span, SLICES=slices, PARTS=len(x.parts),
        FRAMES=x.frames is not None, KEEP=keep, SILU=silu, STAGES=tuning.stages, DEPTH=DEPTH, PTX=PTX,
        num_warps=tuning.warps, maxnreg=65536 // (32 * tuning.warps * tuning.programs) // 8 * 8,
    )  # fmt: skip
    ahead = (tuning.stages - 1) * len(x.parts) * tile * C * width + 8 * C + 1024
    room = waiting(tuning, tiles, ahead, x.like.device)
    if tuning.at_once and slices <= room and (PTX or slices == 1):  # the interpreter's programs don't wait
        images = min(N, room // slices)
        _normalise[(images * slices,)](
            *of, out, N, EPS, launch_cooperative_grid=slices > 1, **shape
        )  # fmt: skip
    else:
        lines = torch.empty(N, 2, C, dtype=torch.float32, device=out.device)
        _statistics[(N * slices,)](*of, lines, EPS, **shape)
        rest = x if kept is None else Sum(torch.zeros_like(x.bias), (kept,))
        _write_to(out, rest, lines, silu)
    return out, kept


def tuning_of(x: Sum) -> Tuning:
    """What was fastest on an H200 (2026-11-23). Frames keep a program too busy to wait for others."""
    if x.frames is None:
        return Tuning()
    return (
        Tuning(slice=65536, warps=8, programs=2, at_once=False)
        if x.parts
        else Tuning(tile=2048, at_once=False)
    )


def add(x: Sum) -> Tensor:
    """x [N, H, W, C]."""
    out = torch.empty(x.shape, dtype=x.like.dtype, device=x.like.device)
    _write_to(out, x)
    return out


def _write_to(out: Tensor, x: Sum, lines: Tensor | None = None, silu: bool = False) -> None:
    N, H, W, C = x.shape
    tile = max(16, 16384 // x.like.element_size() // C)
    _write[(N * triton.cdiv(H * W, tile),)](
        *x.pointers(), x.bias if lines is None else lines, out, H=H, W=W, C=C, R=tile, PARTS=len(x.parts),
        FRAMES=x.frames is not None, NORM=lines is not None, SILU=silu, DEPTH=DEPTH, PTX=PTX, num_warps=8,
    )  # fmt: skip


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels-last memory as [N, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
