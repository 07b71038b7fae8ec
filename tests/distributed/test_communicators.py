"""Every group of a step has been used before the first pass: NCCL then has its memory."""

from __future__ import annotations

import parity
import pytest
import torch
import torch.distributed as dist
from launch import shared

from nextvid_mcore.config import RoleParallel, RunConfig
from nextvid_mcore.parallel import communicators

TENSOR = {"encoder": RoleParallel(tensor=2)}
LAYOUTS = {  # settings, and how many groups a step uses on every rank
    "one-rank": ({}, [2]),
    "dp2": ({}, [2, 2]),
    "tp2-sp": ({**TENSOR, "sequence": True}, [3, 3]),
    "tp2-sp-generator-dp2": ({**TENSOR, "sequence": True, "generator": RoleParallel(data=2)}, [4, 4]),
    "pp2": ({"encoder": RoleParallel(pipeline=2)}, [3, 4]),
    "two-groups": ({"placement": "two-groups", "edge": "direct"}, [2, 2]),
}


def operations() -> dict[str, int]:
    """What every group of this rank has been asked for so far; a new one nothing."""
    groups = dist.distributed_c10d._world.pg_map
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


def of_a_step(config: RunConfig) -> tuple[set[str], set[str], set[str]]:
    """Groups that a step uses, those used before it by whatever, and those the list names."""
    step = parity.built(config)
    before, point = operations(), parity.schedule(config).at(0)
    home, micro = step.seats.home, step.seats.placement.clips(step.seats.mine[0], point.micro_batch)
    step.run(point, parity.clips(config, point, home.data_rank, home.layout.data, micro))
    after = operations()
    used = {name for name in after if after[name] > before.get(name, 0)}
    named = {group.group_name for group in communicators.in_use(step.seats)}
    return used, {name for name, count in before.items() if count > 0}, named


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_uses_no_group_for_the_first_time(layout: str) -> None:
    parallel, counts = LAYOUTS[layout]
    config = parity.small(**parallel).altered(train={"micro_batch": 2})
    found = shared(len(counts)).run(of_a_step, config)
    for (used, before, named), count in zip(found, counts, strict=True):
        assert used <= before
        assert len(named) == count and named <= used  # and sets up no others


def connected(config: RunConfig) -> list[tuple[list[int], int]]:
    """The ranks of every group that is connected for this layout, and the collectives it took."""
    from nextvid_mcore.parallel.groups import init_distributed
    from nextvid_mcore.parallel.plan import check
    from nextvid_mcore.parallel.seats import build_seats

    init_distributed()
    seats = build_seats(check(config, dist.get_world_size()))
    groups = communicators.in_use(seats)
    before = operations()
    communicators.connect(seats, torch.device("cpu"))
    after = operations()
    names = [group.group_name for group in groups]
    return [
        (dist.get_process_group_ranks(group), after[name] - before[name])
        for group, name in zip(groups, names, strict=True)
    ]


def test_each_kind_of_collective_is_taken() -> None:
    for ranks in shared(2).run(connected, parity.small(**TENSOR)):
        assert [count for _, count in ranks] == [3, 3, 3]
        assert sorted(len(members) for members, _ in ranks) == [1, 2, 2]  # data, world, tensor
