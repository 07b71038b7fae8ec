"""The exponential moving average of the student (Table 12: 0.99925), and the reference made of it.

It is kept in fp32 beside the fp32 master weights, sharded as they are: in bf16 one update, 0.00075 of the
distance between two almost equal weights, is below the rounding step and is lost. The frozen reference
encoder gets a copy in its own dtype by one all-gather per bucket of the student's gradient buffer, whose
layout it shares.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from nextvid_mcore.training.shards import ShardedAdamW

ENCODER = "encoder."  # of the student's parameters; the reference has them without this prefix


class Ema:
    """fp32 EMA of the parameter shards that `optimizer` holds; starts at the weights."""

    def __init__(self, optimizer: ShardedAdamW, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        params = optimizer.local_parameters()
        self._shards = {p: optimizer.main(p).detach().clone() for p in params}
        optimizer.extra["ema"] = self._shards
        self._mains = [optimizer.main(p).detach() for p in params]
        self._flat: list[Tensor] = []
        self.places: dict[Parameter, Tensor] = {}  # where in the flat buffers this rank's shards lie
        self._reference: Module | None = None

    @torch.no_grad()
    def update(self) -> None:
        """ema += (1 - decay) * (weights - ema), in fp32 from the master weights."""
        if self._mains:
            torch._foreach_lerp_(list(self._shards.values()), self._mains, 1.0 - self.decay)

    def _attach(self, reference: Module) -> None:
        """Move the reference's parameters into flat buffers laid out as the student's."""
        target = dict(reference.named_parameters())
        names = {p: n for n, p in self.optimizer.model_chunks[0].module.named_parameters()}
        self._flat = []
        for buffer in self.optimizer.buffers:
            flat = torch.zeros(
                buffer.buckets[-1].offset + buffer.buckets[-1].grad_data.numel(),
                dtype=buffer.param_dtype,
                device=buffer.grad_data.device,
            )
            self._flat.append(flat)
            for param, (begin, end, _) in buffer.param_index_map.items():
                name = names[param]
                if not name.startswith(ENCODER):
                    continue
                mine = target.pop(name.removeprefix(ENCODER), None)
                if mine is None or mine.shape != param.shape or mine.dtype != param.dtype:
                    raise ValueError(
                        f"the reference's {name.removeprefix(ENCODER)} must be like the student's {name}, "
                        f"{tuple(param.shape)} {param.dtype}; it is {mine if mine is None else mine.shape}"
                    )
                if mine.requires_grad:
                    raise ValueError(f"the reference must be frozen, but {name} requires a gradient")
                mine.data = flat[begin:end].view(mine.shape)
        if target:
            raise ValueError(f"the student has no counterpart of the reference's {sorted(target)[:3]}")
        self.places = {}
        for param, pieces in self.optimizer.layout():
            for piece in pieces:
                if piece.rank == self.optimizer.data_rank:
                    index = self.optimizer.model_param_gbuf_map[param][0]
                    begin = self.optimizer.buffers[index].param_index_map[param][0]
                    self.places[param] = self._flat[index][begin + piece.start : begin + piece.stop]
        self._reference = reference

    @torch.no_grad()
    def refresh(self, reference: Module) -> None:
        """Write the EMA of `encoder.*` into the parameters of the frozen `reference` encoder."""
        if reference is not self._reference:
            self._attach(reference)
        torch._foreach_copy_(list(self.places.values()), [self._shards[p] for p in self.places])
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Complete the reference from all data ranks' shards, once each has written its own."""
        group, rank = self.optimizer.data_parallel_group, self.optimizer.data_rank
        if group.size() == 1:
            return
        for flat, buffer in zip(self._flat, self.optimizer.buffers, strict=True):
            for bucket in buffer.buckets:
                whole = flat[bucket.offset : bucket.offset + bucket.grad_data.numel()]
                dist.all_gather_into_tensor(whole, whole.chunk(group.size())[rank], group=group)
