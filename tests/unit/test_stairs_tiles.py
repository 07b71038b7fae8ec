"""Tiles of models/stairs.py: what models/gluon_stairs.py multiplies is what a pattern allows."""

from __future__ import annotations

import pytest
import torch

from nextvid_mcore.models.attention import Frames, regular_pattern
from nextvid_mcore.models.stairs import key_tiles, limits, query_tiles

CPU = torch.device("cpu")
STUDENT, ASKED = (Frames(0, 7, 12), Frames(0, 7, 6)), (Frames(1, 7, 32),) * 2
CASES = [
    (STUDENT, STUDENT, "causal"),
    (ASKED, STUDENT, "autoregressive"),
    ((Frames(0, 3, 5),),) * 2 + ("causal",),
]


def dense(pattern, queries: int, keys: int) -> torch.Tensor:
    """bool [queries, keys]."""
    out = torch.zeros(queries, keys, dtype=torch.bool)
    for x in pattern.stretches:
        out[x.q_start : x.q_stop, x.k_start : x.k_stop] = x.allowed[0, 0]
    return out


@pytest.mark.parametrize(("queries", "keys", "rule"), CASES)
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 32)])
def test_every_pair_that_may_see_is_in_one_tile(queries, keys, rule: str, size: tuple[int, int]) -> None:
    pattern = regular_pattern(queries, keys, rule, CPU)
    total = [sum(x.number * x.tokens for x in part) for part in (queries, keys)]
    wanted, limit = dense(pattern, *total).int(), torch.tensor(limits(pattern.stairs), dtype=torch.int32)
    assert len(limit) == total[0] and 0 < wanted.sum() < wanted.numel()

    def seen(rows: range, columns: range, masked: bool) -> tuple[torch.Tensor, ...]:
        """Rows, columns, and what a tile of them adds; a tile without a mask adds everything."""
        rows = torch.tensor([x for x in rows if 0 <= x < total[0]])
        columns = torch.tensor([x for x in columns if x < total[1]])
        ones = torch.ones(len(rows), len(columns), dtype=torch.int32)
        return rows, columns, (columns < limit[rows, None]).int() if masked else ones

    found = torch.zeros_like(wanted)
    for start, stop, first, whole, blocks in query_tiles(pattern.stairs, *size):
        for j in range(blocks):
            keys_of = range(first + j * size[1], first + (j + 1) * size[1])
            rows, columns, ones = seen(range(start, stop), keys_of, j >= whole)
            found[rows[:, None], columns] += ones
    assert torch.equal(found, wanted)

    found.zero_()
    for start, stop, q_stop, whole, tiles in key_tiles(pattern.stairs, size[1], size[0]):
        assert tiles > 0
        for i in range(tiles):
            rows = range(q_stop - (i + 1) * size[0], q_stop - i * size[0])
            rows, columns, ones = seen(rows, range(start, stop), i >= whole)
            found[rows[:, None], columns] += ones
    assert torch.equal(found, wanted)
