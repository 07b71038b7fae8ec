"""Which item a sample is, as a pure function of (seed, global sample index, try).

First the set, by the mixture's weights (Table 6), then the item, uniformly. A rank's samples are plain
arithmetic on the global index, so the state of the whole loader is one integer: the number of finished
steps. Any number of ranks and loader processes sees the same samples in the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from nextvid_mcore.config import ConfigError, SetConfig, require
from nextvid_mcore.data.manifest import Manifest
from nextvid_mcore.rng import numpy_rng

GOLDEN = (math.sqrt(5) - 1) / 2


class Request(NamedTuple):
    """One micro-batch of one rank: the clips' frames and their global sample indices."""

    frames: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """The sets that are drawn from. Weights sum to 1; `note` says, for the log, what was renormalised."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    weights: tuple[float, ...]
    note: str

    def _set(self, place: float | np.ndarray) -> np.ndarray:
        """Index of the set at `place` in [0, 1)."""
        found = np.searchsorted(np.cumsum(self.weights), place, side="right")
        return np.minimum(found, len(self.names) - 1)  # the sum of the weights may round to below 1

    def draw(self, seed: int, group: int, attempt: int = 0) -> tuple[str, int]:
        """(set, row). `group` is the sample index over clips per video. A later try stays in the set."""
        rng = numpy_rng(seed, "item", group)
        which = int(self._set(rng.random()))
        if attempt:
            rng = numpy_rng(seed, "item", group, attempt)
        return self.names[which], int(rng.integers(self.rows[which]))

    def held_out(self, index: int, attempt: int = 0) -> tuple[str, int]:
        """(set, row) of evaluation sample `index`: the same whatever the seed.

        Sets come in their proportions and rows spread evenly over a set, none twice before all were
        once, in any first N samples: a golden-ratio sequence and a stride with no common divisor.
        """
        sets = self._set((np.arange(index + 1) + 0.5) * GOLDEN % 1.0)
        which = int(sets[-1])
        rows = self.rows[which]
        stride = max(1, int(rows * GOLDEN))
        while math.gcd(stride, rows) != 1:
            stride += 1
        drawn = int((sets[:-1] == which).sum())
        return self.names[which], (drawn * stride + attempt) % rows


def build_mixture(manifest: Manifest, sets: Sequence[SetConfig] = ()) -> Mixture:
    """The wanted sets that the manifest holds, weights renormalised. No `sets`: all, by their size."""
    wanted = {entry.name: entry.weight for entry in sets}
    require(len(wanted) == len(sets), f"a data set is named twice in {[entry.name for entry in sets]}")
    if not wanted:
        wanted = {name: float(table.rows) for name, table in manifest.sets.items()}
    names = tuple(name for name in wanted if name in manifest.sets)
    there = ", ".join(manifest.sets)
    require(
        len(names) > 0,
        f"the manifest {manifest.path} holds {there} and none of the wanted sets {', '.join(wanted)}; name "
        "its sets in data.sets, or leave data.sets empty to draw from all",
    )
    total = math.fsum(wanted[name] for name in names)
    weights = tuple(wanted[name] / total for name in names)
    rows = tuple(manifest.sets[name].rows for name in names)
    note = ", ".join(f"{n} {w:.3%} ({r:,} items)" for n, w, r in zip(names, weights, rows, strict=True))
    missing = [f"{name} {weight:g}" for name, weight in wanted.items() if name not in manifest.sets]
    if missing:
        note += f"; weights renormalised over the sets present (not in the manifest: {', '.join(missing)})"
    unused = [name for name in manifest.sets if name not in wanted]
    if unused:
        note += f"; not drawn from: {', '.join(unused)}"
    return Mixture(names, rows, weights, note)


class StageLike(Protocol):
    frames: int


class PointLike(Protocol):
    stage: StageLike
    samples_before: int
    batch: int


class ScheduleLike(Protocol):
    """What `rank_batches` needs of `nextvid_mcore.schedule.Schedule`."""

    total_steps: int

    def at(self, step: int) -> PointLike: ...


def rank_batches(
    schedule: ScheduleLike,
    start_step: int,
    data_rank: int,
    data_size: int,
    clips: Callable[[PointLike], int],
) -> Iterator[Request]:
    """The micro-batches of one data-parallel rank from `start_step` on, in order, of `clips(point)` clips.

    Clip i of micro-batch m on rank r is sample samples_before + (m * data_size + r) * micro + i,
    so that a step is the same set of samples in every layout.
    """
    for step in range(start_step, schedule.total_steps):
        point = schedule.at(step)
        micro_batch = clips(point)
        wave = micro_batch * data_size
        if point.batch % wave:
            raise ConfigError(
                f"step {step}: a batch of {point.batch} clips does not divide into micro-batches of "
                f"{micro_batch} on {data_size} data-parallel ranks; choose a batch divisible by {wave}"
            )
        first = point.samples_before
        for start in range(first + data_rank * micro_batch, first + point.batch, wave):
            yield Request(point.stage.frames, tuple(range(start, start + micro_batch)))
