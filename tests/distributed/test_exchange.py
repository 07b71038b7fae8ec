"""benchmarks/exchange.py on gloo: an exchange that is right, and one that reads rows too early."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launch import shared

from nextvid_mcore.parallel.groups import Layout, build_groups, init_distributed
from nextvid_mcore.recipes import get

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
ROUNDS, LINEARS, EXCHANGES = 4, 4, 3  # of a linear: the reference's pass, the student's, and back


def on_rank(early: bool) -> tuple[int, int]:
    import exchange

    init_distributed()
    group = build_groups(Layout(2, sequence=True)).collection.tp
    return exchange.played(get("tiny"), 1, group, 1e9, ROUNDS, early)


@pytest.mark.parametrize("early", [False, True])
def test_rows_that_are_read_early_are_found_and_nothing_else(early: bool) -> None:
    (differed, exchanges), others = shared(2).run(on_rank, early)
    assert others == (differed, exchanges)
    assert exchanges == 2 * ROUNDS * LINEARS * EXCHANGES  # eager, and eager and late
    assert (differed > 0) == early
