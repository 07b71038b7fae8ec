"""The reference encoder's weights on their way to the generator's ranks, once a step.

The EMA lives with the encoder's optimizer, so each encoder rank has its shard of the reference. The
first data replica's tensor ranks put theirs together; the leader of every pipeline stage broadcasts
its stage to the generator's ranks, which keep their own shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from nextvid_mcore.models.encoder import Encoder
from nextvid_mcore.parallel.placement import Seat
from nextvid_mcore.parallel.seats import Seats

_LAYER = re.compile(r"block\.layers\.(\d+)\.")


class ReferenceEdge:
    """Sends the reference's weights. Every rank of the world makes one and calls it together."""

    def __init__(self, seats: Seats, encoder: Encoder, stage_layers: list[int]) -> None:
        """`encoder`: this rank's reference, whole or a pipeline stage. stage_layers: of every stage."""
        self.encoder, self.stage_layers = encoder, stage_layers
        source: Seat = seats.placement.encoder
        target: Seat = seats.placement.seat_of("reference")
        rank = dist.get_rank()
        self.sends, self.receives = rank in source.ranks, rank in target.ranks
        self.groups = seats.groups[source.name if self.sends else target.name]
        width = source.layout.tensor * source.layout.data
        self.leaders = [source.first_rank + i * width for i in range(source.layout.pipeline)]
        self.channels = [dist.new_group([leader, *target.ranks]) for leader in self.leaders]
        self.sent = 0  # bytes that this rank sent, the last time

    @torch.no_grad()
    def __call__(self) -> None:
        """Bring the generator's reference up to date."""
        for stage, (leader, channel) in enumerate(zip(self.leaders, self.channels, strict=True)):
            if self.sends and self.groups.pipeline_rank == stage and self.groups.data_rank == 0:
                whole = torch.cat([self._gathered(p).flatten() for _, p in self._parameters()])
                if dist.get_rank() == leader:
                    dist.broadcast(whole, leader, group=channel)
                    self.sent = whole.nbytes
            elif self.receives:
                self._receive(stage, leader, channel)

    def _parameters(self) -> Iterator[tuple[str, Parameter]]:
        return self.encoder.named_parameters()

    def _gathered(self, parameter: Parameter) -> Tensor:
        """The whole tensor, on every tensor rank."""
        group = self.groups.collection.tp
        if not _is_split(parameter) or group.size() == 1:
            return parameter
        parts = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(parts, parameter.detach().contiguous(), group=group)
        return torch.cat(parts, dim=parameter.partition_dim)

    def _receive(self, stage: int, leader: int, channel: dist.ProcessGroup) -> None:
        mine = [p for name, p in self._parameters() if self._stage(name) == stage]
        tensor = self.groups.layout.tensor
        sizes = [p.numel() * (tensor if _is_split(p) else 1) for p in mine]
        whole = torch.empty(sum(sizes), dtype=mine[0].dtype, device=mine[0].device)
        dist.broadcast(whole, leader, group=channel)
        for parameter, flat in zip(mine, whole.split(sizes), strict=True):
            shape = list(parameter.shape)
            if not _is_split(parameter):
                parameter.copy_(flat.view(shape))
                continue
            shape[parameter.partition_dim] *= tensor
            parts = flat.view(shape).chunk(tensor, dim=parameter.partition_dim)
            parameter.copy_(parts[self.groups.tensor_rank])

    def _stage(self, name: str) -> int:
        """The encoder's pipeline stage that holds a parameter of the whole encoder."""
        found = _LAYER.search(name)
        if found is None:
            return 0 if name.startswith("patch_embed") else len(self.stage_layers) - 1
        layer = int(found.group(1))
        for stage, layers in enumerate(self.stage_layers):
            if layer < layers:
                return stage
            layer -= layers
        raise ValueError(f"{name}: the encoder has {sum(self.stage_layers)} layers")


def _is_split(parameter: Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))
