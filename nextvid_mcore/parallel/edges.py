"""What crosses between seats, and how its gradient is scaled.

A seat's loss is a mean over its own clips, and megatron-core's DistributedDataParallel averages a
role's gradients over its own replicas. So between a source of `s` data replicas and a destination of
`d` the gradient that goes back is scaled by s / d where it crosses; no parameter's gradient is touched
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Message(dict[str, Tensor]):
    """What megatron-core's schedule carries between seats, by the seat it comes from.

    `features` cross beside it, and no gradient returns for them; None: there are none, or they are packed
    with the rest (megatron-core's bridge takes one tensor an edge).
    """

    def __init__(self, tensors: dict[str, Tensor] | None = None, features: Tensor | None = None) -> None:
        super().__init__(tensors or {})
        self.features = features


@dataclass
class Traffic:
    """Bytes that this rank has sent to other seats since `reset`."""

    forward: int = 0
    backward: int = 0

    def reset(self) -> None:
        self.forward = self.backward = 0

    def goes(self, message: Message, leads: bool) -> None:
        """Sent to the next seat. leads: this rank, of the tensor ranks that hold it, counts it."""
        parts = [*message.values(), *([] if message.features is None else [message.features])]
        self.forward += sum(x.nbytes for x in parts) if leads else 0

    def returns(self, x: Tensor, leads: bool) -> None:
        """x came from the seat before; its gradient, once there is one, is sent back."""
        if leads and x.requires_grad:
            x.register_hook(self._returned)

    def _returned(self, grad: Tensor) -> None:
        self.backward += grad.nbytes


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x; its gradient times `factor`."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.weight), None


def add_loss(x: Tensor, loss: Tensor, weight: float) -> Tensor:
    """x; in the backward pass `weight` * loss joins the loss of which x's gradient comes.

    For a loss on a seat that is not the last: the schedule calls backward on its output alone.
    """
    return _AddLoss.apply(x, loss, weight)


class _BatchShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: int, group: dist.ProcessGroup) -> Tensor:
        ctx.shares, ctx.group = shares, group
        return x.chunk(shares, dim=1)[_share(shares, group)].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = [torch.empty_like(grad) for _ in range(ctx.group.size())]
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        step = ctx.group.size() // ctx.shares  # neighbours that hold the same share have the same gradient
        return torch.cat(parts[::step], dim=1), None, None


def _share(shares: int, group: dist.ProcessGroup) -> int:
    return group.rank() // (group.size() // shares)


def batch_share(x: Tensor, shares: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's clips of x [s, B, E], which all ranks of `group` hold whole: [s, B / shares, E].

    Backward, every rank of the group gets the gradient of all clips.
    """
    return x if shares == 1 else _BatchShare.apply(x, shares, group)


def rows(x: Tensor) -> Tensor:
    """x [s, B, E] as one row a clip: [B, s * E]."""
    return x.transpose(0, 1).flatten(1)


def tokens(rows: Tensor, width: int) -> Tensor:
    """`rows`' inverse: [B, s * width] as [s, B, width]."""
    return rows.reshape(rows.shape[0], -1, width).transpose(0, 1).contiguous()
