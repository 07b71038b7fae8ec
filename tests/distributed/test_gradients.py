"""Gradients of vectors that are added all at once: what megatron-core adds one by one, to the bit."""

from __future__ import annotations

from unittest import mock

import parity
import pytest
import torch
from launch import shared
from megatron.core.distributed import DistributedDataParallel

from nextvid_mcore.config import RoleParallel
from nextvid_mcore.training import optimizer
from nextvid_mcore.training.gradients import RoleDDP

PARALLEL = {
    "one rank": (1, {}),
    "recompute": (1, {"recompute": "full"}),
    "sequence": (2, {"encoder": RoleParallel(tensor=2), "sequence": True}),
    "pipeline": (2, {"encoder": RoleParallel(pipeline=2)}),
    "two groups": (2, {"placement": "two-groups"}),
}


def of_a_step(kind: type, parallel: dict, break_off: bool) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """Gradients of a step in bf16, how many tensors each joint addition had, and how many vectors there are.

    break_off: after a pass that failed amid its backward pass.
    """
    with mock.patch.object(optimizer, "RoleDDP", kind):
        step = parity.built(parity.small(**parallel).altered(train={"precision": "bf16"}))
    point, seats = parity.schedule(step.config).at(0), step.seats
    micro = seats.placement.clips(seats.mine[0], point.micro_batch)
    clips = parity.clips(step.config, point, seats.home.data_rank, seats.home.layout.data, micro)
    vectors = [p for p in step.model.parameters() if p.requires_grad and p.dim() == 1]
    if break_off:
        handle = vectors[0].register_hook(fail)
        with pytest.raises(RuntimeError, match="broken off"):
            step.accumulate(point, clips)
        handle.remove()
    with mock.patch.object(torch, "_foreach_add_", side_effect=torch._foreach_add_) as add:
        step.accumulate(point, clips)
    return parity.gradients(step), [len(call.args[0]) for call in add.call_args_list], len(vectors)


def fail(grad: torch.Tensor) -> None:
    raise RuntimeError("broken off")


def of_both(parallel: dict, break_off: bool) -> tuple:
    return of_a_step(RoleDDP, parallel, break_off), of_a_step(DistributedDataParallel, parallel, False)


@pytest.mark.parametrize("name", [*PARALLEL, "broken off"])
def test_the_same_to_the_bit(name: str) -> None:
    ranks, parallel = PARALLEL.get(name, (1, {}))
    for (mine, added, vectors), (wanted, one_by_one, _) in shared(ranks).run(
        of_both, parallel, name == "broken off"
    ):
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
        assert any(x.any() for x in mine.values())
        assert not one_by_one
        if name != "recompute":  # whose layers are backward passes of their own
            assert max(added) > 5 and sum(added) % vectors == 0
