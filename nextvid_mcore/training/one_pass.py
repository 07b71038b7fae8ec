"""The step's update in one pass (models/triton_update.py), launched before the host has read the norm.

megatron-core's way, which is the reference, reads the norm on the host and then works through gradients,
AdamW, weights, EMA and the frozen encoder one after the other, while the device waits for each. Here the norm
over all roles and ranks stays on the device, where the update reads it. Every rank of a data-parallel group
goes the same way, and so all ranks take part in the same collectives.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from nextvid_mcore.config import OptimConfig
from nextvid_mcore.models.triton_update import AdamW, Shard, Table
from nextvid_mcore.training.ema import Ema
from nextvid_mcore.training.shards import ShardedAdamW


def shards(
    optimizer: ShardedAdamW, ema: Mapping[Parameter, Tensor], places: Mapping[Parameter, Tensor]
) -> list[Shard]:
    """Of one role on this rank. places: of the reference, by the parameter whose EMA it gets."""
    found = []
    decays = {p: group["weight_decay"] for group in optimizer.optimizer.param_groups for p in group["params"]}
    parts = zip(optimizer.local_parameters(), optimizer.weights, *optimizer.gradients(), strict=True)
    for param, weight, grad, counted in parts:
        main = optimizer.main(param)
        state = optimizer.optimizer.state[main]
        found.append(
            Shard(
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                main.detach(),
                weight,
                ema.get(param),
                places.get(param),
                decays[main],
                counted,
            )
        )
    return found


class OnePass:
    """The update of all roles on this rank; EMA and reference must have their tensors already."""

    def __init__(
        self, optimizers: Mapping[str, ShardedAdamW], config: OptimConfig, ema: Ema | None = None
    ) -> None:
        self.optimizers = list(optimizers.values())
        self.adam = AdamW(config.beta1, config.beta2, config.eps, config.clip, config.ema)
        self.device = self.optimizers[0].buffers[0].grad_data.device
        self.tables = []
        for optimizer in self.optimizers:
            has_ema = ema is not None and ema.optimizer is optimizer
            places = ema.places if has_ema else {}
            self.tables.append(Table(shards(optimizer, optimizer.extra.get("ema", {}), places), self.device))

    @torch.no_grad()
    def norm(self, loss: Tensor | None) -> Tensor:
        """Of the gradients of all roles on all ranks, fp32 [1]; not finite where a rank's loss isn't."""
        total = torch.stack([table.squares() for table in self.tables]).sum()
        if loss is not None:
            total = total + loss.detach().to(self.device, torch.float32).sum() * 0
        total = total.float().reshape(1)
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total.sqrt_()

    @torch.no_grad()
    def update(self, norm: Tensor, number: int) -> None:
        """Make this rank's part of the `number`-th update; if the norm isn't finite, change nothing."""
        for optimizer, table in zip(self.optimizers, self.tables, strict=True):
            table.update(norm, optimizer.lr, self.adam, number)
            optimizer.gather_weights()
