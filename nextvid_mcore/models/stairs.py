"""Tiles of the attention in models/gluon_stairs.py: what queries and keys are multiplied, and how.

A stretch's i-th frame of queries sees the first i + 1 frames of its keys (models/triton_stairs.py), so what a
query sees ends at a limit: the first key that it does not see. Limits are keys of the whole row and grow with
the queries, stretch by stretch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Stairs = tuple[tuple[int, int, int, int, int], ...]  # of stretches: where queries, keys begin, frames, N, M
Tiles = list[tuple[int, int, int, int, int]]


def limits(stairs: Stairs) -> list[int]:
    """Of each query."""
    return [k_start + (i // n + 1) * m for _, k_start, frames, n, m in stairs for i in range(frames * n)]


def query_tiles(stairs: Stairs, queries: int, keys: int) -> Tiles:
    """(first query, stop, first key, blocks of which all is seen by all, blocks) of each tile of queries.

    Blocks of `keys` keys begin at the first key. The tiles with most blocks come first: they take longest.
    """
    tiles = []
    for q_start, k_start, frames, n, m in stairs:
        for first in range(0, frames * n, queries):
            stop = min(first + queries, frames * n)
            whole, seen = (first // n + 1) * m, ((stop - 1) // n + 1) * m
            tiles.append((q_start + first, q_start + stop, k_start, whole // keys, -(-seen // keys)))
    return sorted(tiles, key=lambda tile: -tile[-1])


def key_tiles(stairs: Stairs, keys: int, queries: int) -> Tiles:
    """(first key, stop, stop of the queries, blocks of which all see all, blocks) of each tile of keys.

    Blocks of `queries` queries end where the stretch's do, and go backwards. A block that begins before has
    queries of an earlier stretch, whose limits lie below the keys here.
    """
    tiles = []
    for q_start, k_start, frames, n, m in stairs:
        for first in range(0, frames * m, keys):
            stop = min(first + keys, frames * m)
            whole, seeing = ((frames - i // m) * n for i in (stop - 1, first))
            place = (k_start + first, k_start + stop, q_start + frames * n)
            tiles.append((*place, whole // queries, -(-seeing // queries)))
    return sorted(tiles, key=lambda tile: -tile[-1])


@functools.cache
def limits_on(stairs: Stairs, device: torch.device) -> Tensor:
    """`limits`, int32 [queries]. Kept, as `tiles_on` is: recorded passes read them."""
    return torch.tensor(limits(stairs), dtype=torch.int32, device=device)


@functools.cache
def tiles_on(stairs: Stairs, of_keys: bool, tile: int, block: int, device: torch.device) -> Tensor:
    """`key_tiles` or `query_tiles`, int32 [tiles, 5]."""
    tiles = (key_tiles if of_keys else query_tiles)(stairs, tile, block)
    return torch.tensor(tiles, dtype=torch.int32, device=device)
