"""Communicators that are there before the memory is full.

NCCL sets up a group's communicator when the group is first used, also that of a single rank, and connects its
ranks when they first take a kind of collective. It asks CUDA for the memory, to which torch's allocator
doesn't give back what it keeps: a first reduction after a first backward pass can end a run whose networks
fit. So every group that a step uses is used once before there are networks.

Edges between seats set up theirs themselves (parallel/direct_edge.py); megatron-core's bridge does so in the
first step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from nextvid_mcore.parallel.seats import Seats


def connect(seats: Seats, device: torch.device) -> None:
    """Take one small collective of each kind on every group of a step. Every rank must call it."""
    for group in in_use(seats):
        whole = torch.zeros(group.size(), device=device)
        mine = torch.zeros(1, device=device)
        dist.all_reduce(whole, group=group)
        dist.reduce_scatter_tensor(mine, whole, group=group)
        dist.all_gather_into_tensor(whole, mine, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_use(seats: Seats) -> list[dist.ProcessGroup]:
    """The groups in whose collectives this rank takes part in a step, in the same order everywhere.

    The world's for losses and norms, and the data ranks' for gradients and weights, which megatron-core uses
    with a single rank too; tensor and pipeline ranks' where there are several.
    """
    found = [dist.group.WORLD]
    for seat in seats.mine:
        part = seats.groups[seat.name].collection
        found.append(part.dp)
        found += [group for group in (part.tp, part.pp) if group.size() > 1]
    return list(dict.fromkeys(found))
