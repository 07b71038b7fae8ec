"""The held-out loss: Eq. 9 on a fixed list of validation clips, whatever the layout, seed or stage.

The first `eval.samples` clips of the validation manifest (middle window, centre crop) at the first stage's
number of frames, with masks, tau and noise fixed per index. It is taken for the online encoder and for the
EMA (the reference as the encoder), in all and by tau and by predicted frame. What is gathered from the
ranks are values of single clips; they are put in the order of their index and reduced in float64, so
neither the layout nor a resume changes the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextvid_mcore.config import LossConfig, RunConfig
from nextvid_mcore.data.loader import ClipBatch, build_dataset, iterate
from nextvid_mcore.models.encoder import Encoder
from nextvid_mcore.models.nextvid import LossTerms, MicroBatch
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.rng import key
from nextvid_mcore.training.engine import Engine, _StageModel
from nextvid_mcore.training.feed import share
from nextvid_mcore.training.step import TrainStep

SEED = key(0, "eval")  # of masks, tau and noise: not the run's, so that runs can be compared
WORKERS_FROM = 8  # batches from which loader processes are worth their start
WEIGHTS = ("ema", "online")


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
    def merged(cls, tables: Sequence[Table]) -> Table:
        """All rows in the order of their index."""
        there = [name for name, value in vars(tables[0]).items() if value is not None]
        joined = {name: torch.cat([getattr(each, name) for each in tables]) for name in there}
        order = joined["index"].argsort()
        if not torch.equal(joined["index"][order], torch.arange(len(order))):
            raise RuntimeError(f"held-out samples are not 0 to {len(order) - 1}: {joined['index'].tolist()}")
        return cls(**{name: values[order] for name, values in joined.items()})

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


def held_out_terms(engine: Engine, clip: ClipBatch, tau_samples: int, encoder: Encoder) -> list[LossTerms]:
    """Loss terms of one micro-batch with `encoder` in the student's place; [] before the last stage."""
    batch = engine.micro_batch(clip, tau_samples, SEED)
    features = engine.reference_features([clip])
    if engine.model.last:
        batch = dataclasses.replace(batch, features=features[0])
    found: list[LossTerms] = []

    def step(iterator: Iterator[MicroBatch], stage: object) -> tuple[Tensor, Callable]:
        out = engine.model(next(iterator), encoder)
        if engine.model.last:
            found.append(out)
            out = out.z
        return out, lambda x, non_loss_data=False: x

    length = batch.masks.tokens.shape[1]
    engine._run(step, _StageModel(encoder), [batch], length, forward_only=True)
    return found


class Evaluator:
    """Runs the held-out loss on all ranks. Clips are decoded once and kept, 8 bits a value."""

    def __init__(self, config: RunConfig, train_step: TrainStep, groups: RoleGroups) -> None:
        self.config, self.train_step, self.groups = config, train_step, groups
        self.frames = config.stages[0].frames
        self.dataset = build_dataset(config, train=False)
        self._clips: list[ClipBatch] | None = None

    def _requests(self) -> list[tuple[int, ...]]:
        """This replica's share of the batches: the same batches in every layout."""
        size, samples = self.config.eval.batch, self.config.eval.samples
        batches = [tuple(range(i, min(i + size, samples))) for i in range(0, samples, size)]
        return batches[self.groups.data_rank :: self.groups.layout.data]

    def _load(self) -> Iterator[ClipBatch]:
        """This replica's clips, decoded by its first rank."""
        data, requests = self.config.data, self._requests()
        loader: Iterator[ClipBatch] | None = None
        if self.groups.collection.mp.rank() == 0:
            loader = iterate(
                self.dataset,
                [(self.frames, indices) for indices in requests],
                workers=data.workers if len(requests) >= WORKERS_FROM else 0,
                prefetch=data.prefetch,
                timeout=data.timeout,
            )
        for indices in requests:
            batch = None if loader is None else next(loader)
            batch = share(batch, len(indices), self.frames, self.config.model.image_size, self.groups)
            yield dataclasses.replace(batch, video=batch.video.cpu())  # kept off the GPU
        if loader is not None:
            loader.close()

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The row of eval.jsonl without its step, the same on every rank."""
        if self._clips is None:
            self._clips = list(self._load())
        tables: dict[str, list[Table]] = {name: [] for name in WEIGHTS}
        engine, model = self.train_step.engine, self.train_step.model
        encoders = {"ema": model.reference, "online": model.student.encoder}
        bins = self.config.eval.tau_bins
        for clip in self._clips:
            for name, encoder in encoders.items():
                for terms in held_out_terms(engine, clip, bins, encoder):
                    tables[name].append(Table.of(clip.index.tolist(), terms, bins))
        row: dict[str, Any] = {"samples": self.config.eval.samples, "frames": self.frames}
        for name in WEIGHTS:
            row[name] = self._gather(tables[name]).summary(self.config.loss)
        return row

    def _gather(self, mine: list[Table]) -> Table:
        """All clips' values on every rank. Pipeline stages before the last have none of their own."""
        every = self.groups.collection.intra_dist_opt
        found: list[list[Table]] = [[] for _ in range(every.size())]
        speaks = self.groups.last_stage and self.groups.tensor_rank == 0
        dist.all_gather_object(found, mine if speaks else [], group=every)
        return Table.merged([table for tables in found for table in tables])
