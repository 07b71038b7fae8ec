"""megatron-core's DistributedOptimizer, whose state can be saved and loaded parameter by parameter.

Each data-parallel rank keeps the fp32 master weights and Adam's moments of one slice of every flat gradient
bucket. For a checkpoint, the rank that holds a parameter's first element saves it: nearly every parameter
lies on one rank, and only those cut by a slice's edge travel. A rank needs 1 / data of the state in host
memory, where megatron-core's `fully_reshardable` gathers all of it on every rank, and which misplaces
parameters when a bucket's end is padded and another bucket follows. The keys are the same:
`optimizer.state.<param | exp_avg | exp_avg_sq | ...>.<name of the parameter in the model>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, Adam, DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from nextvid_mcore.config import OptimConfig
from nextvid_mcore.parallel.groups import RoleGroups

STATE_PREFIX = "optimizer.state"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter, held by data-parallel rank `rank`."""

    rank: int
    start: int
    stop: int


def decays(name: str, param: Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms and other one-dimensional parameters."""
    return param.dim() >= 2 and not name.endswith(".bias")


class ShardedAdamW(DistributedOptimizer):
    """AdamW over one role's DistributedDataParallel, sharded over its data-parallel ranks.

    `extra` holds further fp32 tensors per parameter shard that are saved along, such as the EMA.
    """

    def __init__(self, role: DistributedDataParallel, config: OptimConfig, groups: RoleGroups) -> None:
        named = [(n, p) for n, p in role.module.named_parameters() if p.requires_grad]
        param_groups = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ]
        settings = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
        if HAVE_APEX_OR_TE:  # Adam is then Transformer Engine's or apex's FusedAdam
            inner = Adam(param_groups, adam_w_mode=True, **settings)
        else:
            inner = torch.optim.AdamW(param_groups, **settings)
        dtype = named[0][1].dtype
        collection = groups.collection
        super().__init__(
            inner,
            OptimizerConfig(
                optimizer="adam", lr=0.0, use_distributed_optimizer=True, params_dtype=dtype,
                bf16=dtype == torch.bfloat16, overlap_param_gather=role.ddp_config.overlap_param_gather,
            ),
            None,
            None,
            model_chunks=[role],
            per_model_buffers={0: role.buffers},
            data_parallel_group=collection.dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=collection.mp.rank(),
            distributed_optimizer_instance_id=0,
        )  # fmt: skip
        self.tp_group = self.expert_tp_group = collection.tp  # who counts a replicated gradient
        self.extra: dict[str, dict[Parameter, Tensor]] = {}
        self._masters = [self.main(p).detach() for p in self.local_parameters()]
        self.weights = [self._weight(p) for p in self.local_parameters()]
        self._fill_state()

    def _fill_state(self) -> None:
        """Allocate Adam's moments now, so that a checkpoint can be loaded before the first step."""
        for group in self.optimizer.param_groups:
            for main in group["params"]:
                state = self.optimizer.state[main]
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(main), torch.zeros_like(main)
        self.set_updates(0)

    def set_updates(self, updates: int) -> None:
        """Tell Adam how many updates it has made (its bias correction)."""
        for group in self.optimizer.param_groups:
            if HAVE_APEX_OR_TE:
                group["step"] = updates
                continue
            for main in group["params"]:  # a tensor each: torch increments them in place
                self.optimizer.state[main]["step"] = torch.tensor(float(updates))

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def data_rank(self) -> int:
        return self.data_parallel_group.rank()

    def local_parameters(self) -> list[Parameter]:
        """The model's parameters of which this rank holds a shard."""
        return list(self.model_param_group_index_map)

    def main(self, param: Parameter) -> Tensor:
        """This rank's fp32 master shard of a model parameter, flat."""
        group, order = self.model_param_group_index_map[param]
        return self.optimizer.param_groups[group]["params"][order]

    def _weight(self, param: Parameter) -> Tensor:
        """This rank's shard of a model parameter itself, flat."""
        place = self._get_model_param_range_map(param)["gbuf_world_in_bucket"]
        index, _, bucket = self.model_param_gbuf_map[param]
        return self.buffers[index].buckets[bucket].param_data.view(-1)[place.start : place.end]

    @torch.no_grad()
    def scale_grads(self, factor: float) -> None:
        """A launch a bucket: megatron-core's clipping lists parameter by parameter while the GPU waits."""
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                mine = bucket.grad_data.view(-1).chunk(self.data_parallel_group.size())[self.data_rank]
                mine.mul_(factor)

    @torch.no_grad()
    def _copy_main_params_to_model_params(self) -> None:
        """In one launch what megatron-core does one by one."""
        if self.weights:
            torch._foreach_copy_(self.weights, self._masters)

    @torch.no_grad()
    def gradients(self) -> tuple[list[Tensor], list[bool]]:
        """Of `local_parameters`: this rank's part of the reduced gradient, flat, and whether the norm counts
        it: not where a tensor rank before this one has the same.
        """
        self.prepare_grads()
        grads = [self.main(p).grad for p in self.local_parameters()]
        counted = {x.data_ptr() for x in self.get_grads_for_grad_norm()}
        self.zero_grad()
        return grads, [x.data_ptr() in counted for x in grads]

    def gather_weights(self) -> None:
        """Complete the weights from all data ranks' parts, unless the next forward pass does."""
        if not self.ddp_config.overlap_param_gather:
            self.start_param_sync_for_bucket_group_subset()

    def tensors(self, param: Parameter) -> dict[str, Tensor]:
        """Every saved tensor of this rank's shard of a model parameter, by name, flat, fp32."""
        main = self.main(param)
        state = self.optimizer.state[main]
        kept = {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return {k: v.detach() for k, v in kept.items()} | {k: v[param] for k, v in self.extra.items()}

    def layout(self) -> Iterator[tuple[Parameter, list[Piece]]]:
        """Every parameter of the role and who holds which part, in one order on all data ranks."""
        for buffer in self.buffers:
            for param, (begin, end, bucket_id) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_id]
                size = bucket.grad_data.numel() // self.data_parallel_group.size()
                first, last = ((x - bucket.offset) // size for x in (begin, end - 1))
                yield (
                    param,
                    [
                        Piece(
                            rank,
                            max(bucket.offset + rank * size - begin, 0),
                            min(bucket.offset + (rank + 1) * size, end) - begin,
                        )
                        for rank in range(first, last + 1)
                    ],
                )

    def _gather(self, param: Parameter, pieces: list[Piece]) -> dict[str, Tensor] | None:
        """Whole tensors of a parameter on its first holder; None on the others."""
        mine = self.tensors(param)
        if len(pieces) == 1:
            return mine
        group, names = self.data_parallel_group, list(mine)
        first = pieces[0].rank
        if self.data_rank != first:
            dist.send(torch.stack([mine[n] for n in names]), dist.get_global_rank(group, first), group)
            return None
        parts = [torch.stack([mine[n] for n in names])]
        for piece in pieces[1:]:
            part = parts[0].new_empty(len(names), piece.stop - piece.start)
            dist.recv(part, dist.get_global_rank(group, piece.rank), group)
            parts.append(part)
        return dict(zip(names, torch.cat(parts, dim=1), strict=True))

    @torch.no_grad()
    def sharded_tensors(self, model_state: ShardedStateDict, loading: bool) -> dict[str, Any]:
        """Shards of master weights, moments and extras as the checkpoint keeps them.

        Args:
            model_state: the role module's `sharded_state_dict()`: it says how tensor and pipeline ranks
                split each parameter.
            loading: True: empty host tensors for every parameter this rank holds a part of.
        """
        by_param = {id(entry.data): entry for entry in nested_values(model_state)}
        out: dict[str, Any] = {}
        for number, (param, pieces) in enumerate(self.layout()):
            place = next((i for i, piece in enumerate(pieces) if piece.rank == self.data_rank), None)
            if place is None:
                continue
            if loading:
                whole = {n: torch.empty(param.numel()) for n in self.tensors(param)}
            else:
                whole = self._gather(param, pieces)
            if whole is None:
                continue
            entry = by_param[id(param)]
            if not isinstance(entry, ShardedTensor):
                raise TypeError(f"{entry.key} is saved through a factory, which the optimizer can't follow")
            out[str(number)] = {
                name: replace(
                    entry,
                    key=f"{STATE_PREFIX}.{name}.{entry.key}",
                    data=tensor.view(param.shape),
                    dtype=tensor.dtype,
                    replica_id=(*entry.replica_id[:2], place),
                )
                for name, tensor in whole.items()
            }
        return out

    @torch.no_grad()
    def load_tensors(self, loaded: dict[str, Any]) -> None:
        """Take this rank's part of what `sharded_tensors(loading=True)` asked for."""
        for number, (param, pieces) in enumerate(self.layout()):
            for piece in pieces:
                if piece.rank == self.data_rank:
                    for name, shard in self.tensors(param).items():
                        shard.copy_(loaded[str(number)][name].reshape(-1)[piece.start : piece.stop])
