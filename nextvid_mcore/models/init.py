"""First weights, a function of (seed, tensor name) alone.

Every tensor is drawn whole from its own generator and the rank keeps its shard, so that the start
is the same in every layout. Linears: normal, `init_std`; the two that write into the residual
stream divided by sqrt(2 * depth) (GPT-2). Zero: biases, the predictor's query, AdaLN, the decoder's
output. `noise` fills what starts at zero with seeded noise, since a fresh model's zeros would make
parity tests pass for nothing.
"""

from __future__ import annotations

import math
import zlib

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from nextvid_mcore.rng import torch_generator

ZERO = ("adaln.weight", "output.weight", "query")
RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def _std(key: str, depth: int, std: float, noise: float) -> float:
    if key.endswith(".bias") or key.endswith(ZERO):
        return noise
    return std / math.sqrt(2 * depth) if key.endswith(RESIDUAL) else std


@torch.no_grad()
def init_weights(
    module: MegatronModule,
    role: str,
    groups: ProcessGroupCollection,
    seed: int,
    std: float,
    noise: float = 0.0,
) -> None:
    """Fill `module`, which is `role`, in place."""
    for name, entry in module.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).items():
        if not isinstance(entry, ShardedTensor):
            continue  # Transformer Engine's extra state
        if "norm" in name:
            entry.data.fill_(1.0 if name.endswith("weight") else 0.0)
            if noise and name.endswith("bias"):
                _fill(entry, role, seed, noise)
            continue
        _fill(entry, role, seed, _std(entry.key, module.config.num_layers, std, noise))


def _fill(entry: ShardedTensor, role: str, seed: int, std: float) -> None:
    """Draw the whole tensor of `entry` and copy this rank's shard of it."""
    if std == 0.0:
        entry.data.zero_()
        return
    axes = entry.prepend_axis_num  # layers are stacked along a leading axis in the global view
    layer = entry.global_offset[0] if axes else 0
    generator = torch_generator(seed, "init", zlib.crc32(f"{role}.{entry.key}".encode()), layer)
    whole = torch.empty(entry.global_shape[axes:]).normal_(0.0, std, generator=generator)
    for dim, start in enumerate(entry.global_offset[axes:]):
        whole = whole.narrow(dim, start, entry.local_shape[dim])
    entry.data.copy_(whole)
