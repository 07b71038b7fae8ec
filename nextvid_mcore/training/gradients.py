"""megatron-core's DistributedDataParallel, with the gradients of biases and norms added all at once.

It adds every gradient to fp32 `main_grad` in a hook of its own. Matrix products do so themselves for their
weights; what is left are some five hundred vectors a micro-batch, each a kernel too short for a GPU. Here
they wait in `.grad` until the backward pass ends; then two lists go to the GPU, to be cast and added. The
sums are the same to the bit. Where gradients are reduced during the backward pass nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.nn import Parameter


class RoleDDP(DistributedDataParallel):
    """One role of this rank, gradients in fp32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._waiting: list[Parameter] = []
        self._casts: dict[Parameter, Tensor] = {}  # in the same memory every time: a recorded pass keeps it
        super().__init__(*args, **kwargs)

    def _make_backward_post_hook(self, param: Parameter) -> Callable[..., None]:
        if self.ddp_config.overlap_grad_reduce or param.dim() > 1:
            return super()._make_backward_post_hook(param)
        self._casts[param] = torch.empty_like(param, dtype=torch.float32)

        def hook(*unused: Any) -> None:
            if not self._waiting:  # a callback belongs to the pass that runs
                torch.autograd.Variable._execution_engine.queue_callback(self._add)
            self._waiting.append(param)

        return hook

    @torch.no_grad()
    def _add(self) -> None:
        params = [x for x in self._waiting if x.grad is not None]
        self._waiting.clear()
        if params:
            casts = [self._casts[x] for x in params]
            torch._foreach_copy_(casts, [x.grad for x in params])
            torch._foreach_add_([x.main_grad for x in params], casts)
        for param in params:
            param.grad = None

    def zero_grad_buffer(self) -> None:
        """Before the first micro-batch of a step; forgets what a pass that broke off left waiting too."""
        for param in self._waiting:
            param.grad = None
        self._waiting.clear()
        super().zero_grad_buffer()
