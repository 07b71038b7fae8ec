"""kNN on the frozen EMA encoder while it trains: a look at what the features hold, every now and then.

A fixed small set of labelled clips (data/labelled.py), at the first stage's number of frames, goes through
the reference encoder, forward only; the mean over tokens of each is classified by its nearest neighbours
(evaluation/knn.py). The encoder's replicas share the clips, whatever the placement; the features are put in
the clips' order, so the answer does not depend on the layout.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextvid_mcore import flops
from nextvid_mcore.config import RunConfig
from nextvid_mcore.data.labelled import build_labelled
from nextvid_mcore.data.loader import ClipBatch
from nextvid_mcore.evaluation.knn import classify
from nextvid_mcore.models import fp8
from nextvid_mcore.parallel import watchdog
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.training import full_memory
from nextvid_mcore.training.evaluate import decoded
from nextvid_mcore.training.feed import share
from nextvid_mcore.training.step import TrainStep


class OnlineKnn:
    """Runs on all ranks. Clips are decoded once and kept, 8 bits a value, by the first rank of a replica."""

    def __init__(
        self, config: RunConfig, train_step: TrainStep, seats: Seats, say: Callable[[str], None]
    ) -> None:
        self.config, self.train_step, self.seats, self.say = config, train_step, seats, say
        self.every = config.eval.knn_every
        self.frames = config.stages[0].frames
        self.clips = build_labelled(config)
        self.groups = seats.of("student")  # None: this rank has no encoder
        # a forward pass takes less than a step
        self.size = size = max(config.eval.batch, config.micro_batch(config.stages[0]))
        numbers = range(len(self.clips))
        self._all = [tuple(numbers[i : i + size]) for i in range(0, len(numbers), size)]
        self._kept: list[ClipBatch | None] | None = None
        self._since = time.perf_counter()
        say(flops.knn_note(config))

    def run(self, training: str = full_memory.TRAINING) -> dict[str, Any]:
        """Its part of a row of eval.jsonl: top-1 in percent by task, the same on every rank; and its cost.

        Args:
            training: the setting that holds the training's memory, to be named where there is none left.
        """
        if self._kept is None:
            begin = time.perf_counter()
            self._kept = list(self._load())
            took = time.perf_counter() - begin
            self.say(f"online kNN: {len(self.clips):,} clips read in {took:.1f} s, once a start")
            self._since += took
        begin = time.perf_counter()
        numbers, features = self.features(training)
        row: dict[str, Any] = {f"knn_{k}": v for k, v in self._top1(numbers, features).items()}
        end = time.perf_counter()
        row |= {
            "knn_clips": len(numbers),
            "knn_time": end - begin,
            "knn_share": (end - begin) / (begin - self._since),
        }
        self._since = end
        return row

    def summary(self, row: dict[str, Any]) -> str:
        """A line for the log."""
        found = ", ".join(f"{task} {row[f'knn_{task}']:.1f}%" for task in self.clips.tasks)
        cost = f"{row['knn_time']:.2g} s, {row['knn_share']:.2%} of the time since the last"
        return f"kNN {found} ({row['knn_clips']:,} clips, {cost})"

    def features(self, training: str = full_memory.TRAINING) -> tuple[Tensor, Tensor]:
        """Numbers int64 [N] of the readable clips, rising, and features float32 [N, D]; on all ranks."""
        mine = full_memory.agreed(lambda: self._features(training), self.seats.apart)
        everyones: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine)
        index, rows = (torch.cat(part) for part in zip(*sum(everyones, []), strict=True))
        order = index.argsort()
        return index[order], rows[order]

    @torch.no_grad()
    def _features(self, training: str) -> list[tuple[Tensor, Tensor]]:
        """Of this replica's clips, on the rank that speaks for it."""
        mine: list[tuple[Tensor, Tensor]] = []
        if self.groups is None:
            return mine
        fp8.quantise_again([self.train_step.model.reference])  # the step has changed its weights
        speaks = self.groups.last_stage and self.groups.tensor_rank == 0
        with full_memory.told("online kNN", f"with {self.size} clips a pass; lower {self._lower(training)}"):
            for indices, kept in zip(self._requests(), self._kept, strict=True):
                watchdog.progress()
                batch = share(kept, len(indices), self.frames, self.config.model.image_size, self.groups)
                found = self.train_step.engine.encode([batch])
                if speaks:
                    good = batch.label.cpu() >= 0
                    mine.append((batch.index.cpu()[good], found[0].float().mean(0).cpu()[good]))
        return mine

    def _lower(self, training: str) -> str:
        """The settings that make a pass smaller, and the training's."""
        config, first = self.config, self.config.stages[0]
        of = {"--eval.batch": config.eval.batch, config.micro_batch_flag(first): config.micro_batch(first)}
        held = " and ".join(flag for flag, clips in of.items() if clips == self.size > 1)
        return training if held in ("", training) else f"{held}, or {training}"

    def _requests(self) -> list[tuple[int, ...]]:
        """This replica's share of the clips."""
        return self._all[self.groups.data_rank :: self.groups.layout.data]

    def _load(self) -> Iterator[ClipBatch | None]:
        """This replica's clips on its first rank, Nones on the others."""
        if self.groups is None:
            return
        requests = self._requests()
        if self.groups.collection.mp.rank() != 0:
            yield from [None] * len(requests)
            return
        for batch in decoded(self.clips, self.frames, requests, self.config.data):
            watchdog.progress()
            yield dataclasses.replace(batch, items=[])

    def _top1(self, numbers: Tensor, features: Tensor) -> dict[str, float]:
        """Percent right by task; nan where bad files left nothing to compare."""
        out = {}
        asked, labels = self.clips.asked[numbers], self.clips.labels[numbers]
        for column, task in enumerate(self.clips.tasks):
            label = labels[:, column]
            known, wanted = (label >= 0) & ~asked, (label >= 0) & asked
            if not known.any() or not wanted.any():
                out[task] = float("nan")
                continue
            guess = classify(features[known], label[known], features[wanted], int(label.max()) + 1)
            out[task] = 100 * (guess == label[wanted]).float().mean().item()
        return out
