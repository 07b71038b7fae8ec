"""What stands between the convolutions of VA-VAE's encoder, in Triton: it only moves memory.

    normalise   GroupNorm and SiLU, in one reading from memory. Programs add up their slices, wait for each
                other, and read their slices again, which the L2 cache still has: little is in flight at a
                time. A group needs its own channels alone, so those wait for each other that have the same
                share of an image's, as many as a line of memory holds. Sums are added in a fixed order.
    begin       the first convolution of the frames, and its norm. It is made twice, for the sums and to be
                written: a product of 27 (padded to 32) with 128 numbers a pixel costs less than to read
                what was made from memory, 16.8 MB an image.

Activations are [N, H, W, C], statistics fp32. targets/fused_vae.py puts these together;
targets/autoencoder.py is what they stand for.
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
    """How a norm is cut: numbers of a tile (of bf16) and of a slice (one program's share), warps, programs a
    multiprocessor holds, programs that wait for each other at most.
    """

    tile: int = 4096
    slice: int = 16384
    warps: int = 4
    programs: int = 4
    stages: int = 3
    together: int = 128


# What was fastest on an H100 (2026-11-23; benchmarks/RESULTS.md), FRAMES on an H200.
WHOLE, FRAMES = Tuning(), Tuning(tile=2048, slice=32768, together=256)
SHARE = 64  # channels: a line of 128 bytes


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
def _places(n, p, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Where places p [R] of share n of the channels lie, [R, C]."""
    image, share = n // (WIDE // C), n % (WIDE // C)
    return image.to(tl.int64) * (H * W * WIDE) + p[:, None] * WIDE + share * C + tl.arange(0, C)[None, :]


@triton.jit
def _read(
    x, first, n, p, inside,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, FRAMES: tl.constexpr,
    DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Places p [R] of image n, [R, C] in fp32: of x, or of the first convolution of the frames x, without
    its bias. What is not `inside` means nothing. n counts shares of C of the WIDE channels.
    """
    c = tl.arange(0, C)[None, :]
    if FRAMES:
        t = tl.arange(0, DEPTH)
        row, column = t % 9 // 3 - 1, t % 3 - 1
        v, u = p[:, None] // W + row[None, :], p[:, None] % W + column[None, :]
        there = (v >= 0) & (v < H) & (u >= 0) & (u < W) & (t < 27)[None, :]
        where = p[:, None] + (t // 9 * (H * W) + row * W + column)[None, :]
        patch = tl.load(x + n.to(tl.int64) * (3 * H * W) + where, mask=there, other=0.0)
        weight = tl.load(first + t[:, None] * C + c)
        if not PTX:  # Triton's interpreter multiplies the bits of bf16 as if they were integers
            patch, weight = patch.to(tl.float32), weight.to(tl.float32)
        return tl.dot(patch, weight, input_precision="ieee")
    else:
        return tl.load(x + _places(n, p, H, W, C, WIDE), mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _slice(
    x, first, bias, sums, n, k,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, SPAN: tl.constexpr, SLICES: tl.constexpr, FRAMES: tl.constexpr,
    STAGES: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add up slice k of image n and its squares into sums [N, SLICES, 2, G]."""
    EVEN: tl.constexpr = H * W == SLICES * TILES * R
    c, g = tl.arange(0, C), tl.arange(0, G)
    total = tl.zeros([SPAN, C], tl.float32)
    square = tl.zeros([SPAN, C], tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        p = (k * TILES + i) * R + tl.arange(0, R)
        inside = (p < H * W) | EVEN
        v = _read(x, first, n, p, inside, H, W, C, WIDE, FRAMES, DEPTH, PTX)
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
    # the bias, afterwards: with count positions, (v + b)^2 is v^2 + 2 b v + count b^2
    b = tl.load(bias + n % (WIDE // C) * C + c).to(tl.float32)
    count = tl.maximum(tl.minimum(H * W - k * (TILES * R), TILES * R), 0).to(tl.float32)
    square += b * (2.0 * total + count * b)
    total += count * b
    to = sums + (n * SLICES + k) * (2 * G) + g
    tl.store(to, tl.sum(tl.reshape(total, [G, C // G]), 1))
    tl.store(to + G, tl.sum(tl.reshape(square, [G, C // G]), 1))


@triton.jit
def _line(
    sums, weight, shift, bias, n, eps,
    P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, SLICES: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """What normalises image n, of which x has the bias still to get: a number [C] to multiply with, and one
    to add. SiLU wants half of both.
    """
    MORE: tl.constexpr = triton.next_power_of_2(SLICES)
    g, s = tl.arange(0, G), tl.arange(0, MORE)
    c = n % (WIDE // C) * C + tl.arange(0, C)
    parts = sums + n * (SLICES * 2 * G) + s[:, None] * (2 * G) + g[None, :]
    there = (s < SLICES)[:, None] & (g >= 0)[None, :]
    mean = tl.sum(tl.load(parts, mask=there, other=0.0, cache_modifier=".cg"), 0) / (P * (C // G))
    spread = tl.sum(tl.load(parts + G, mask=there, other=0.0, cache_modifier=".cg"), 0) / (P * (C // G))
    scale = tl.rsqrt(tl.maximum(spread - mean * mean, 0.0) + eps)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], [G, C // G]), [C])
    scale *= tl.load(weight + c).to(tl.float32)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], [G, C // G]), [C])
    start = tl.load(shift + c).to(tl.float32) - (mean - tl.load(bias + c).to(tl.float32)) * scale
    if SILU:
        scale, start = 0.5 * scale, 0.5 * start
    return scale, start


@triton.jit
def _statistics(
    x, first, bias, sums, arrived, weight, shift, lines, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, SPAN: tl.constexpr, SLICES: tl.constexpr, FRAMES: tl.constexpr,
    SILU: tl.constexpr, STAGES: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Only what normalises each image or share of one, lines [N, 2, C]: its last program writes it."""
    n = tl.program_id(0) // SLICES
    _slice(
        x, first, bias, sums, n, tl.program_id(0) % SLICES,
        H, W, C, WIDE, G, R, TILES, SPAN, SLICES, FRAMES, STAGES, DEPTH, PTX,
    )  # fmt: skip
    tl.debug_barrier()  # all threads have stored before one says so
    if tl.atomic_add(arrived + n, 1, sem="acq_rel") == SLICES - 1:
        scale, start = _line(sums, weight, shift, bias, n, eps, H * W, C, WIDE, G, SLICES, SILU)
        c = tl.arange(0, C)
        tl.store(lines + n * (2 * C) + c, scale)
        tl.store(lines + n * (2 * C) + C + c, start)


@triton.jit
def _write(
    x, first, bias, lines, out, kept,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, R: tl.constexpr, FRAMES: tl.constexpr,
    SILU: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Normalised by `lines`; and of frames, what it was of, to `kept`."""
    tiles: tl.constexpr = (H * W + R - 1) // R
    EVEN: tl.constexpr = H * W == tiles * R
    n = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * R + tl.arange(0, R)
    inside = (p < H * W) | EVEN
    c = tl.arange(0, C)[None, :]
    v = _read(x, first, n, p, inside, H, W, C, C, FRAMES, DEPTH, PTX)
    at = _places(n, p, H, W, C, C)
    if FRAMES:
        tl.store(kept + at, v + tl.load(bias + c).to(tl.float32), mask=inside[:, None])
    v = v * tl.load(lines + n * (2 * C) + c) + tl.load(lines + n * (2 * C) + C + c)
    if SILU:
        v = _silu_of_half(v, PTX)
    tl.store(out + at, v, mask=inside[:, None])


@triton.jit
def _normalise(
    x, bias, sums, arrived, weight, shift, out, count, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, SPAN: tl.constexpr, SLICES: tl.constexpr, SILU: tl.constexpr,
    STAGES: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = H * W == SLICES * TILES * R
    k = tl.program_id(0) % SLICES
    n = tl.program_id(0) // SLICES
    while n < count:  # the interpreter has no range() over its numbers
        _slice(x, x, bias, sums, n, k, H, W, C, WIDE, G, R, TILES, SPAN, SLICES, False, STAGES, DEPTH, PTX)
        tl.debug_barrier()
        there = tl.atomic_add(arrived + n, 1, sem="acq_rel") + 1
        while there < SLICES:
            there = tl.atomic_add(arrived + n, 0, sem="acquire")
        tl.debug_barrier()
        scale, start = _line(sums, weight, shift, bias, n, eps, H * W, C, WIDE, G, SLICES, SILU)
        for j in tl.range(0, TILES, num_stages=STAGES):  # what was read last comes first
            p = (k * TILES + (TILES - 1 - j)) * R + tl.arange(0, R)
            inside = (p < H * W) | EVEN
            v = _read(x, x, n, p, inside, H, W, C, WIDE, False, DEPTH, PTX)
            v = v * scale[None, :] + start[None, :]
            if SILU:
                v = _silu_of_half(v, PTX)
            tl.store(out + _places(n, p, H, W, C, WIDE), v, mask=inside[:, None])
        n += tl.num_programs(0) // SLICES


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


@dataclass(frozen=True)
class Cut:
    """An image of H * W places, or a share of its channels, in `slices` of `tiles` of `tile` places each."""

    tile: int
    tiles: int
    slices: int

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], width: int, tuning: Tuning, device: torch.device) -> Cut:
        """shape: images or shares, H, W, C, of `width` bytes each."""
        N, H, W, C = shape
        tile = min(max(16, tuning.tile * 2 // width // C), max(16, triton.next_power_of_2(H * W)))
        room = tuning.programs * _processors(device)[0]
        longest = max(tuning.slice, H * W * C // tuning.together)
        slices = triton.cdiv(H * W * C, max(min(longest, N * H * W * C // room), tile * C))
        tiles = triton.cdiv(H * W, slices * tile)
        return cls(tile, tiles, triton.cdiv(H * W, tiles * tile))

    def constants(self, shape: tuple[int, int, int, int], tuning: Tuning, silu: bool) -> dict[str, int]:
        """What `_statistics` and `_normalise` are compiled for, but for SPAN; shape: as above."""
        return dict(
            H=shape[1], W=shape[2], C=shape[3], R=self.tile, TILES=self.tiles, SLICES=self.slices,
            SILU=silu, STAGES=tuning.stages, DEPTH=DEPTH, PTX=PTX, num_warps=tuning.warps,
            maxnreg=65536 // (32 * tuning.warps * tuning.programs) // 8 * 8,
        )  # fmt: skip


def shares(C: int) -> int:
    """Of C channels, that are normalised by themselves: whole groups each."""
    return min(GROUPS, max(1, C // SHARE))


def normalise(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    arrived: Tensor,
    *,
    bias: Tensor,
    silu: bool = True,
    in_place: bool = False,
    tuning: Tuning = WHOLE,
) -> Tensor:
    """GroupNorm with weight and shift [C] of x [N, H, W, C] + bias [C], and SiLU -> [N, H, W, C].

    arrived: zeros [N * shares(C)], int32, for this call alone. in_place: into x's memory.
    """
    N, H, W, C = x.shape
    width, share = x.element_size(), C // shares(C)
    count = N * shares(C)
    shape = count, H, W, share
    cut = Cut.of(shape, width, tuning, x.device)
    out = x if in_place else torch.empty_like(x)
    sums = torch.empty(count, cut.slices, 2, GROUPS * share // C, dtype=torch.float32, device=x.device)
    # a thread reads 16 bytes at once, so a program's threads have as many rows between them
    span = min(cut.tile, max(1, tuning.warps * 512 // width // share))
    ahead = (tuning.stages - 1) * cut.tile * share * width + 8 * share + 1024
    room = waiting(tuning, cut.tiles, ahead, x.device)
    constants = cut.constants(shape, tuning, silu) | dict(WIDE=C, G=sums.shape[-1], SPAN=span)
    if cut.slices <= room and (PTX or cut.slices == 1):  # the interpreter's programs don't wait
        together = min(count, room // cut.slices)
        _normalise[(together * cut.slices,)](
            x, bias, sums, arrived, weight, shift, out, count, EPS,
            launch_cooperative_grid=cut.slices > 1, **constants,
        )  # fmt: skip
    else:
        lines = torch.empty(count, 2, share, dtype=torch.float32, device=x.device)
        _statistics[(count * cut.slices,)](
            x, x, bias, sums, arrived, weight, shift, lines, EPS, FRAMES=False, **constants
        )
        lines = lines.view(N, -1, 2, share).transpose(1, 2).contiguous()
        _write_to(out, out, x, bias, lines, silu)
    return out


def begin(
    frames: Tensor,
    first: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    arrived: Tensor,
    tuning: Tuning = FRAMES,
) -> tuple[Tensor, Tensor]:
    """The first convolution of frames [N, 3, H, W], normalised with SiLU, and as it is, [N, H, W, C].

    first: its weights as a matrix [32, C] (`matrix_of`). weight, shift: the norm's. arrived: as above.
    """
    N, _, H, W = frames.shape
    C = len(bias)
    shape = N, H, W, C
    cut = Cut.of(shape, frames.element_size(), tuning, frames.device)
    sums = torch.empty(N, cut.slices, 2, GROUPS, dtype=torch.float32, device=frames.device)
    lines = torch.empty(N, 2, C, dtype=torch.float32, device=frames.device)
    normed, kept = (torch.empty(shape, dtype=frames.dtype, device=frames.device) for _ in range(2))
    _statistics[(N * cut.slices,)](
        frames, first, bias, sums, arrived, weight, shift, lines, EPS, WIDE=C, G=GROUPS, SPAN=cut.tile,
        FRAMES=True, **cut.constants(shape, tuning, True),
    )  # fmt: skip
    _write_to(normed, kept, frames, bias, lines, True, first)
    return normed, kept


def _write_to(
    out: Tensor, kept: Tensor, x: Tensor, bias: Tensor, lines: Tensor, silu: bool, first: Tensor | None = None
) -> None:
    N, H, W, C = out.shape
    tile = max(16, 16384 // out.element_size() // C)
    _write[(N * triton.cdiv(H * W, tile),)](
        x, x if first is None else first, bias, lines, out, kept, H=H, W=W, C=C, R=tile,
        FRAMES=first is not None, SILU=silu, DEPTH=DEPTH, PTX=PTX, num_warps=8,
    )  # fmt: skip


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels-last memory as [N, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
