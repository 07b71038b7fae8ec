"""Where tensor ranks' rows lie in each other's memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nextvid_mcore.parallel.mailbox import ALIGNED, Slots


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shapes", [((3, 5),), ((7, 40), (7, 40)), ((128, 8), (1, 1), (9, 100))])
def test_no_two_pushes_meet(ranks: int, shapes: tuple[tuple[int, int], ...]) -> None:
    slots = Slots(tuple(torch.Size(x) for x in shapes), 2, ranks)
    for rank in range(ranks):
        others = [source for source in range(ranks) if source != rank]
        taken = sorted(
            (2 * slots.start(slot, source, rank), 2 * math.prod(shape))
            for slot, shape in enumerate(shapes)
            for source in others
        )
        assert taken[0][0] == 0 and all(start % ALIGNED == 0 for start, _ in taken)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(taken))
        assert sum(taken[-1]) <= slots.size < sum(taken[-1]) + ALIGNED
