"""The edge of our own between seats: who sends what to whom, and every number of micro-batches."""

from __future__ import annotations

import dataclasses

import parity
import pytest
import test_layouts as layouts
import torch.distributed as dist
from launch import run
from test_layouts import Case

from nextvid_mcore.parallel.direct_edge import wires
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.placement import Seat

COUNTS = (1, 2, 3, 4, 6)  # micro-batches: fewer than a seat runs ahead, as many, and more
CASES = {
    "one-rank": Case(1),
    "three-1-1-1": Case(3, placement="three-groups"),
    "two-pp2-1": Case(3, pipeline=2, placement="two-groups"),
}
GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 2), (2, 4)]


@pytest.mark.parametrize("source", GRIDS)
@pytest.mark.parametrize("target", GRIDS)
def test_every_rank_hears_all_its_clips_once_and_in_order(source: tuple[int, int], target: tuple[int, int]):
    seats, first = [], 0
    for name, pipeline, (tensor, data) in (("encoder", 2, source), ("generator", 1, target)):
        seats.append(Seat(name, (), Layout(tensor, pipeline, data), first))
        first = seats[-1].ranks.stop
    for a, b in (seats, reversed(seats)):
        clips, heard = 8, {}
        for wire in wires(a, b):
            place = a.coordinates(wire.sender)
            assert place["pipeline"] == a.layout.pipeline - 1  # where the encoder ends
            size = clips // a.layout.data
            start = place["data"] * size + wire.part * size // wire.parts
            heard.setdefault(wire.receiver, []).extend(range(start, start + size // wire.parts))
        ends = {r for r in b.ranks if b.coordinates(r)["pipeline"] == b.layout.pipeline - 1}
        assert heard.keys() == ends
        for rank, indices in heard.items():
            size, data = clips // b.layout.data, b.coordinates(rank)["data"]
            assert indices == list(range(data * size, (data + 1) * size))


def steps(names: list[str]) -> dict[tuple[str, int], dict]:
    return {(name, count): found for name in names for count, found in gradients(CASES[name]).items()}


def gradients(case: Case) -> dict[int, dict]:
    """Losses, gradients, what crossed, and the most micro-batches in flight, by their number."""
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.placement import resolve_placement
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    config = layouts.configure(case)
    init_distributed()
    placement = resolve_placement(config, dist.get_world_size())
    seats = build_seats(placement)
    seed_trackers(0, seats.home)
    step = TrainStep(config, seats)
    first = parity.schedule(config).at(0)
    found = {}
    for count in COUNTS:
        point = dataclasses.replace(first, batch=count * case.micro)
        mine = parity.clips(config, point, 0, 1, placement.clips(seats.mine[0], point.micro_batch))
        assert len(mine) == count
        step.engine.traffic.reset()
        losses, _ = step.gradients(point, mine)
        found[count] = {"losses": losses, "grads": layouts.reduced(step)}
        if placement.separate:
            edge = step.engine.communicator
            channels = [c for pair in (edge.before, edge.after) if pair for c in pair]
            assert not any(c._sent or c._posted or c._left for c in channels)  # nothing is left over
            found[count]["ahead"] = edge.total_stages - edge.current_stage - 1
    return found


def test_every_number_of_micro_batches_gives_the_gradient_of_one_rank() -> None:
    one = run(steps, 1, ["one-rank"], timeout=300)[0]
    names = [name for name, case in CASES.items() if case.ranks == 3]
    results = run(steps, 3, names, timeout=300)
    ahead = {name: [each[name, 1]["ahead"] for each in results] for name in names}
    assert ahead == {"three-1-1-1": [4, 2, 0], "two-pp2-1": [3, 2, 0]}
    for name in names:
        for count in COUNTS:
            want, got = one["one-rank", count], [each[name, count] for each in results]
            for each in got:
                assert each["losses"] == pytest.approx(want["losses"], rel=1e-5)
            grads, found = layouts.merged([want], "grads"), layouts.merged(got, "grads")
            assert grads.keys() == found.keys()
            floor = 1e-5 * max(g.abs().max() for g in grads.values())
            for key, grad in grads.items():
                assert (grad - found[key]).abs().max() <= 1e-5 * max(grad.abs().max(), floor), (count, key)
