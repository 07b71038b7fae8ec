"""Linears under sequence parallelism whose exchange of rows runs beside their products.

megatron-core's and Transformer Engine's gather all rows and multiply, or multiply and reduce-scatter. Here a
product is cut by the rank that its rows come from or go to. A rank multiplies its own rows while the others'
arrive; of what it owes to others it makes theirs first, and its own while that travels. Weight gradients need
the input's rows again: they come beside the products of the input's gradient. (The idea is Transformer
Engine's userbuffers' and torch's async tensor parallelism; parallel/mailbox.py carries the rows.)

Parameters, names, shards and what is returned are those of the class that is subclassed. Outside of `beside`
that class itself is at work: here ranks wait for each other at every product, and where a pass is not
recorded their hosts are late by turns, which costs more than is won.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nextvid_mcore.models import fp8_products
from nextvid_mcore.parallel import mailbox

_state = {"beside": False}
PARTS = 2  # in which rows for another rank are made and sent: the first travels while the second is made


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class _WeightGradient:
    """dy^T x, added up in the weight's fp32 buffer where the linear does so, else in a tensor."""

    def __init__(self, linear: Any) -> None:
        self.linear, self.fused = linear, linear.config.gradient_accumulation_fusion
        self.sum: Tensor | None = None  # what autograd gets

    def add(self, dy: Tensor, x: Tensor) -> None:
        if self.fused:
            self.sum = fp8_products.weight_gradient(self.linear, x, dy)
        elif self.sum is None:
            self.sum = dy.t() @ x
        else:
            self.sum.addmm_(dy.t(), x)


class _Column(torch.autograd.Function):
    """x [m, D], a rank's rows -> [tp * m, width / tp], of all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Any) -> Tensor:
        box = mailbox.of(linear.tp_group)
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        out = x.new_empty(box.size * len(x), len(weight))
        rows = out.chunk(box.size)
        box.open([x.shape], x)
        for other in box.others:
            box.push(0, other, [x])
        _multiply(x, weight, bias, rows[box.rank])
        for other in reversed(box.others):
            _multiply(box.take(0, other), weight, bias, rows[other])
        box.close()
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        box, gradient, dx = mailbox.of(ctx.linear.tp_group), _WeightGradient(ctx.linear), None
        rows = dy.contiguous().chunk(box.size)
        given, owed = 0, int(wants_weight)  # slots; one that nobody fills would wait for the next exchange's
        box.open([x.shape] * (wants_weight + wants_x), x)
        if wants_weight:
            for other in box.others:
                box.push(given, other, [x])
        if wants_x:
            for other in box.others:
                box.push(owed, other, (part @ weight for part in rows[other].chunk(PARTS)))
            dx = rows[box.rank] @ weight
        if wants_weight:
            gradient.add(rows[box.rank], x)
            for other in reversed(box.others):
                gradient.add(rows[other], box.take(given, other))
        if wants_x:
            for other in reversed(box.others):
                dx.add_(box.take(owed, other))
        box.close()
        return dx, gradient.sum, dy.sum(0) if wants_bias else None, None


class _Row(torch.autograd.Function):
    """x [tp * m, width / tp], of all ranks' rows -> [m, D], a rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: Any) -> Tensor:
        box = mailbox.of(linear.tp_group)
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        rows = x.chunk(box.size)
        box.open([torch.Size((len(rows[0]), len(weight)))], x)
        for other in box.others:
            box.push(0, other, (part @ weight.t() for part in rows[other].chunk(PARTS)))
        out = rows[box.rank] @ weight.t()
        for other in reversed(box.others):
            out.add_(box.take(0, other))
        box.close()
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        box, gradient = mailbox.of(ctx.linear.tp_group), _WeightGradient(ctx.linear)
        dy, dx, rows = dy.contiguous(), torch.empty_like(x), x.chunk(box.size)
        into = dx.chunk(box.size)

        def use(rank: int, dy: Tensor) -> None:
            if wants_x:
                torch.mm(dy, weight, out=into[rank])
            if wants_weight:
                gradient.add(dy, rows[rank])

        box.open([dy.shape], dy)
        for other in box.others:
            box.push(0, other, [dy])
        use(box.rank, dy)
        for other in reversed(box.others):
            use(other, box.take(0, other))
        box.close()
        return dx if wants_x else None, gradient.sum, None


def _returns_bias(linear: Any) -> bool:
    """Whether who calls the linear adds its bias."""
    return linear.te_return_bias if hasattr(linear, "te_return_bias") else linear.skip_bias_add


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Passes inside exchange rows beside their products where they can: recorded ones, and those before."""
    before = _state["beside"]
    _state["beside"] = True
    try:
        yield
    finally:
        _state["beside"] = before


@functools.cache
def column(base: type, always: bool) -> type:
    """`base`, a backend's column-parallel linear, that does so, `always` or inside `beside`."""

    class OverlappedColumn(base):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """[s / tp, rows, D] -> [s, rows, width / tp], and the bias if it is still to be added."""
            if not (always or _state["beside"]):
                return super().forward(x)
            bias, later = self.bias, _returns_bias(self)
            out = _Column.apply(x.flatten(0, 1), self.weight, None if later else bias, self)
            return out.view(-1, x.shape[1], out.shape[1]), bias if later else None

    return OverlappedColumn


@functools.cache
def row(base: type, always: bool) -> type:
    """The same of a row-parallel linear."""

    class OverlappedRow(base):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """[s, rows, width / tp] -> [s / tp, rows, D], and the bias if it is still to be added."""
            if not (always or _state["beside"]):
                return super().forward(x)
            out = _Row.apply(x.flatten(0, 1), self.weight, self)
            out = out.view(-1, x.shape[1], out.shape[1])
            return (out, self.bias) if _returns_bias(self) else (out + self.bias, None)

    return OverlappedRow
