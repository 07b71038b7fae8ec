"""Clipping, AdamW, EMA and rounded weights of many tensors in one pass over memory, without the host.

Done one after another, these read and write some seventy bytes a parameter; here every number is read once
and written once, forty bytes. One launch serves all shards: a table on the device says where their tensors
lie, a list of chunks which part of which shard a program takes. The gradients' norm comes from another kernel
over the same list and stays on the device: the update reads it there, clips by it, and changes nothing where
it is not finite.

Squares are summed by chunk, and the sums then added in a fixed order: the same norm every time. All is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # elements of a program
BLOCK, WARPS = 512, 4  # elements at once: a vector of four a thread and tensor
# the table's columns: addresses (0: there is none), elements, whether the norm counts the gradient
GRAD, MOMENT, SQUARE, MASTER, WEIGHT, EMA, REFERENCE, SIZE, COUNTED, COLUMNS = map(tl.constexpr, range(10))
PTX = not triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a parameter, flat tensors of one size.

    grad, moment, square (Adam's), master and ema: fp32; weight and reference: bf16. Weight and reference are
    written alone. decay: weight decay. counted: whether its gradient is part of the norm.
    """

    grad: Tensor
    moment: Tensor
    square: Tensor
    master: Tensor
    weight: Tensor
    ema: Tensor | None = None
    reference: Tensor | None = None  # gets the EMA
    decay: float = 0.0
    counted: bool = True

    def __post_init__(self) -> None:
        for name, dtype in (
            ("weight", torch.bfloat16),
            ("reference", torch.bfloat16),
            ("ema", torch.float32),
        ):
            self._check(name, getattr(self, name), dtype)
        for name in ("grad", "moment", "square", "master"):
            self._check(name, getattr(self, name), torch.float32)
        if self.reference is not None and self.ema is None:
            raise ValueError("a reference is a copy of the EMA, and there is no EMA")

    def _check(self, name: str, x: Tensor | None, dtype: torch.dtype) -> None:
        if x is not None and not (x.dtype == dtype and x.is_contiguous() and x.shape == self.grad.shape):
            raise ValueError(
                f"{name} must be contiguous {dtype} {tuple(self.grad.shape)}, not {x.dtype} {tuple(x.shape)}"
            )

    def tensors(self) -> list[Tensor | None]:
        """In the order of the table."""
        return [
            self.grad, self.moment, self.square, self.master, self.weight, self.ema, self.reference
        ]  # fmt: skip


@triton.jit
def _tensor(table, shard, COLUMN: tl.constexpr, kind: tl.constexpr):
    return tl.load(table + shard * COLUMNS + COLUMN).to(tl.pointer_type(kind))


@triton.jit
def _places(at, offsets, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED: four elements are one access."""
    places = at + offsets
    if ALIGNED:
        places = tl.max_contiguous(places, BLOCK)
        places = tl.multiple_of(places, 4 * at.dtype.element_ty.primitive_bitwidth // 8)
    return places


@triton.jit
def _squares(table, chunks, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """sums[i]: of the squared gradients of chunk i."""
    shard, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    grad = _tensor(table, shard, GRAD, tl.float32)
    end = tl.minimum(tl.load(table + shard * COLUMNS + SIZE).to(tl.int32), first + CHUNK)
    if tl.load(table + shard * COLUMNS + COUNTED) == 0:
        end = first
    total = tl.zeros([BLOCK], dtype=tl.float32)
    i = first
    while i + BLOCK <= end:
        x = tl.load(_places(grad, i + tl.arange(0, BLOCK), BLOCK, ALIGNED))
        total += x * x
        i += BLOCK
    if i < end:
        offsets = i + tl.arange(0, BLOCK)
        x = tl.load(grad + offsets, mask=offsets < end, other=0.0)
        total += x * x
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _rounded(x, PTX: tl.constexpr):
    """To bf16, nearest even; Triton's interpreter would cut."""
    if PTX:
        return x.to(tl.bfloat16)
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _step(
    grad, moment, square, master, weight, ema, reference, offsets, end, factor, decay,
    lr, old1, new1, old2, new2, eps, unbias1, unbias2, old_ema, new_ema,
    PART: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One block; PART: it ends before BLOCK elements. The EMA's masks are the same for all elements, so that
    they break up no access.
    """
    here = tl.full([BLOCK], 1, tl.int1)
    if PART:
        here = offsets < end
    averaged = here & (ema.to(tl.int64) != 0)
    shown = here & (reference.to(tl.int64) != 0)
    to_moment, to_square = _places(moment, offsets, BLOCK, ALIGNED), _places(square, offsets, BLOCK, ALIGNED)
    to_master, to_ema = _places(master, offsets, BLOCK, ALIGNED), _places(ema, offsets, BLOCK, ALIGNED)
    # all loads before the first store, which the compiler leaves in their order
    g = tl.load(_places(grad, offsets, BLOCK, ALIGNED), mask=here, other=0.0) * factor
    m = tl.load(to_moment, mask=here, other=0.0)
    v = tl.load(to_square, mask=here, other=0.0)
    p = tl.load(to_master, mask=here, other=0.0)
    e = tl.load(to_ema, mask=averaged, other=0.0)
    m = old1 * m + new1 * g
    v = old2 * v + new2 * g * g
    p -= lr * (tl.div_rn(m * unbias1, tl.sqrt_rn(v * unbias2) + eps) + decay * p)
    e = tl.where(new_ema < 0.5, e + new_ema * (p - e), p - old_ema * (p - e))  # 0 and 1 are exact
    tl.store(to_moment, m, mask=here)
    tl.store(to_square, v, mask=here)
    tl.store(to_master, p, mask=here)
    tl.store(_places(weight, offsets, BLOCK, ALIGNED), _rounded(p, PTX), mask=here)
    tl.store(to_ema, e, mask=averaged)
    tl.store(_places(reference, offsets, BLOCK, ALIGNED), _rounded(e, PTX), mask=shown)


@triton.jit
def _update(
    table, decays, chunks, norm, clip,
    lr, old1, new1, old2, new2, eps, unbias1, unbias2, old_ema, new_ema,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One chunk, if the norm is finite."""
    length = tl.load(norm)
    if length < float("inf"):
        factor = tl.minimum(tl.div_rn(clip, length + 1e-6), 1.0)
        shard, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
        grad, moment = _tensor(table, shard, GRAD, tl.float32), _tensor(table, shard, MOMENT, tl.float32)
        square, master = _tensor(table, shard, SQUARE, tl.float32), _tensor(table, shard, MASTER, tl.float32)
        weight, ema = _tensor(table, shard, WEIGHT, tl.bfloat16), _tensor(table, shard, EMA, tl.float32)
        reference, decay = _tensor(table, shard, REFERENCE, tl.bfloat16), tl.load(decays + shard)
        end = tl.minimum(tl.load(table + shard * COLUMNS + SIZE).to(tl.int32), first + CHUNK)
        i = first
        while i + BLOCK <= end:
            _step(
                grad, moment, square, master, weight, ema, reference, i + tl.arange(0, BLOCK), end, factor,
                decay, lr, old1, new1, old2, new2, eps, unbias1, unbias2, old_ema, new_ema,
                PART=False, BLOCK=BLOCK, ALIGNED=ALIGNED, PTX=PTX,
            )  # fmt: skip
            i += BLOCK
        if i < end:
            _step(
                grad, moment, square, master, weight, ema, reference, i + tl.arange(0, BLOCK), end,
                factor, decay, lr, old1, new1, old2, new2, eps, unbias1, unbias2, old_ema, new_ema,
                PART=True, BLOCK=BLOCK, ALIGNED=ALIGNED, PTX=PTX,
            )  # fmt: skip


@dataclass(frozen=True)
class AdamW:
    """What an update takes of the configuration; ema: what stays of the average."""

    beta1: float
    beta2: float
    eps: float
    clip: float
    ema: float


class Table:
    """Shards that are updated in one launch. Their tensors must stay where they are."""

    def __init__(self, shards: Sequence[Shard], device: torch.device) -> None:
        self.shards = list(shards)  # holds what the addresses point to
        rows, chunks = [], []
        for number, shard in enumerate(self.shards):
            size = shard.grad.numel()
            addresses = [0 if x is None else x.data_ptr() for x in shard.tensors()]
            rows.append([*addresses, size, int(shard.counted)])
            chunks += [[number, first] for first in range(0, size, CHUNK)]
        self.count = len(chunks)
        tensors = [x for shard in self.shards for x in shard.tensors() if x is not None]
        self.aligned = all(x.data_ptr() % (4 * x.element_size()) == 0 for x in tensors)
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self.chunks = torch.tensor(chunks, dtype=torch.int32, device=device)
        self.decays = torch.tensor([x.decay for x in self.shards], dtype=torch.float32, device=device)
        self.sums = torch.zeros(self.count, dtype=torch.float32, device=device)

    def squares(self) -> Tensor:
        """The sum of the gradients' squares, fp64 []."""
        if self.count:
            _squares[(self.count,)](
                self.rows, self.chunks, self.sums,
                CHUNK=CHUNK, BLOCK=BLOCK, ALIGNED=self.aligned, num_warps=WARPS,
            )  # fmt: skip
        return self.sums.sum(dtype=torch.float64)

    def update(self, norm: Tensor, lr: float, adam: AdamW, number: int) -> None:
        """The `number`-th update with gradients of that norm, fp32 [1]; nothing if it is not finite."""
        if not self.count:
            return
        _update[(self.count,)](
            self.rows, self.decays, self.chunks, norm, adam.clip,
            lr, adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.eps,
            1 / (1 - adam.beta1**number), 1 / (1 - adam.beta2**number), adam.ema, 1 - adam.ema,
            CHUNK=CHUNK, BLOCK=BLOCK, ALIGNED=self.aligned, PTX=PTX, num_warps=WARPS,
        )  # fmt: skip
