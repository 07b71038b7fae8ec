"""The held-out loss: Eq. 9 on a fixed list of validation clips, whatever the layout, seed or stage.

The first `eval.samples` clips of the validation manifest (middle window, centre crop) at the first stage's
number of frames, with masks, tau and noise fixed per index. It is taken for the online encoder and for the
EMA (the reference as the encoder), in all and by tau and by predicted frame. What is gathered from the
ranks are values of single clips; they are put in the order of their index and reduced in float64, so
neither the layout nor a resume changes the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextvid_mcore.config import DataConfig, LossConfig, RunConfig
from nextvid_mcore.data.loader import ClipBatch, build_dataset, iterate
from nextvid_mcore.models.nextvid import LossTerms
from nextvid_mcore.parallel import watchdog
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.rng import key
from nextvid_mcore.training import full_memory
from nextvid_mcore.training.feed import blank, share
from nextvid_mcore.training.step import TrainStep

SEED = key(0, "eval")  # of masks, tau and noise: not the run's, so that runs can be compared
WORKERS_FROM = 8  # batches from which loader processes are worth their start
WEIGHTS = ("ema", "online")


def decoded(
    dataset: Any, frames: int, requests: Sequence[Sequence[int]], data: DataConfig
) -> Iterator[ClipBatch]:
    """Batches of clips with the sample indices of `requests`, by loader processes where that pays."""
    return iterate(
        dataset,
        [(frames, indices) for indices in requests],
        workers=data.workers if len(requests) >= WORKERS_FROM else 0,
        prefetch=data.prefetch,
        timeout=data.timeout,
    )


@dataclass(frozen=True)
class Table:
    """Values of single clips: index int64 [S], the rest float64; None for a loss that is switched off."""

    index: Tensor
    flow: Tensor | None = None  # [S, p], means over masks and tau samples
    align: Tensor | None = None  # [S, p], means over masks
    bin_sum: Tensor | None = None  # [S, bins], flow terms summed over the tau of a bin
    bin_count: Tensor | None = None  # [S, bins]

    @classmethod
    def of(cls, index: Sequence[int], terms: LossTerms, bins: int) -> Table:
        """From one micro-batch's loss terms."""
        values: dict[str, Tensor] = {"index": torch.tensor(list(index))}
        if terms.align is not None:
            values["align"] = terms.align.detach().double().cpu().mean(1)
        if terms.flow is not None:
            flow, tau = (x.detach().double().cpu() for x in (terms.flow, terms.tau))
            which = (tau * bins).long().clamp(0, bins - 1)
            inside = torch.nn.functional.one_hot(which, bins).double()  # [B, M, p, K, bins]
            values["flow"] = flow.mean((1, 3))
            values["bin_sum"] = (flow[..., None] * inside).sum((1, 2, 3))
            values["bin_count"] = inside.sum((1, 2, 3))
        return cls(**values)

    @classmethod
    def merged(cls, tables: Sequence[Table], samples: int) -> Table:
        """The first `samples` rows in the order of their index. Tables of different seats have
        different columns."""
        columns: dict[str, Tensor] = {"index": torch.arange(samples)}
        for name in ("flow", "align", "bin_sum", "bin_count"):
            there = [table for table in tables if getattr(table, name) is not None]
            if not there:
                continue
            index = torch.cat([table.index for table in there])
            order = index.argsort()[:samples]
            if not torch.equal(index[order], columns["index"]):
                raise RuntimeError(f"held-out samples are not 0 to {samples - 1}: {index.tolist()}")
            columns[name] = torch.cat([getattr(table, name) for table in there])[order]
        return cls(**columns)

    def summary(self, loss: LossConfig) -> dict[str, Any]:
        """The numbers of eval.jsonl. Null: a loss that is switched off, a tau bin that no draw fell into."""
        flow, align = (None if x is None else x.mean().item() for x in (self.flow, self.align))
        by_tau = None if flow is None else (self.bin_sum.sum(0) / self.bin_count.sum(0)).tolist()
        return {
            "loss": loss.total(flow, align),
            "loss_flow": flow,
            "loss_align": align,
            "flow_by_tau": by_tau,
            "flow_by_frame": None if flow is None else self.flow.mean(0).tolist(),
            "align_by_frame": None if align is None else self.align.mean(0).tolist(),
        }


class Evaluator:
    """Runs the held-out loss on all ranks. Clips are decoded once and kept, 8 bits a value."""

    def __init__(self, config: RunConfig, train_step: TrainStep, seats: Seats) -> None:
        self.config, self.train_step, self.seats, self.groups = config, train_step, seats, seats.home
        self.every, self.frames = config.eval.every, config.stages[0].frames
        self.dataset = build_dataset(config, train=False)
        self._clips: list[ClipBatch] | None = None

    def _requests(self) -> list[tuple[int, ...]]:
        """This replica's share of the clips: the same batches in every layout of one seat.

        Seats of their own exchange whole waves, so there the last wave is filled up, and the surplus
        dropped from the table.
        """
        size, samples = self.config.eval.batch, self.config.eval.samples
        if not self.seats.placement.separate and self.train_step.engine.shares == 1:
            batches = [tuple(range(i, min(i + size, samples))) for i in range(0, samples, size)]
            return batches[self.groups.data_rank :: self.groups.layout.data]
        wave = size * self.seats.placement.encoder.layout.data
        mine = wave // self.groups.layout.data
        first = range(self.groups.data_rank * mine, -(-samples // wave) * wave, wave)
        return [tuple(range(start, start + mine)) for start in first]

    def _load(self) -> Iterator[ClipBatch]:
        """This replica's clips, decoded by its first rank."""
        requests = self._requests()
        if not self.seats.mine[0].sees_video:
            yield from (blank((self.frames, indices)) for indices in requests)
            return
        loader: Iterator[ClipBatch] | None = None
        if self.groups.collection.mp.rank() == 0:
            loader = decoded(self.dataset, self.frames, requests, self.config.data)
        for indices in requests:
            batch = None if loader is None else next(loader)
            batch = share(batch, len(indices), self.frames, self.config.model.image_size, self.groups)
            yield dataclasses.replace(batch, video=batch.video.cpu())  # kept off the GPU
        if loader is not None:
            loader.close()

    def run(self, training: str = full_memory.TRAINING) -> dict[str, Any]:
        """The row of eval.jsonl without its step, the same on every rank.

        Args:
            training: the setting that holds the training's memory, to be named where there is none left.
        """
        tables = full_memory.agreed(lambda: self._tables(training), self.seats.apart)
        row: dict[str, Any] = {"samples": self.config.eval.samples, "frames": self.frames}
        for name in WEIGHTS:
            row[name] = self._gather(tables[name]).summary(self.config.loss)
        return row

    @torch.no_grad()
    def _tables(self, training: str) -> dict[str, list[Table]]:
        """Of this rank's clips."""
        if self._clips is None:
            self._clips = list(self._load())
        tables: dict[str, list[Table]] = {name: [] for name in WEIGHTS}
        engine, bins, size = self.train_step.engine, self.config.eval.tau_bins, self.config.eval.batch
        own = "--eval.batch" if size > 1 else "--eval.tau-bins"
        with full_memory.told(
            "held-out loss", f"with {size} clip{'s' if size > 1 else ''} a pass; lower {own}, or {training}"
        ):
            for clip in self._clips:
                watchdog.progress()
                for name in WEIGHTS:
                    for index, terms in engine.held_out(clip, bins, SEED, ema=name == "ema"):
                        tables[name].append(Table.of(index, terms, bins))
        return tables

    def summary(self, row: dict[str, Any]) -> str:
        """A line for the log."""
        return f"held-out loss {row['ema']['loss']:.5g} (EMA), {row['online']['loss']:.5g} (online)"

    def _gather(self, mine: list[Table]) -> Table:
        """All clips' values on every rank, from one tensor rank of every replica that has losses."""
        groups = self.seats.of("predictor") or self.seats.of("decoder")
        speaks = groups is not None and groups.tensor_rank == 0
        found: list[list[Table]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine if speaks else [])
        return Table.merged([table for tables in found for table in tables], self.config.eval.samples)
