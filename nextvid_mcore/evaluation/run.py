"""A whole probe: encoder and data in, one results file out. `tools/probe.py` is its command line."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextvid_mcore import __version__
from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.data.guard import DataError
from nextvid_mcore.evaluation import knn, sweep
from nextvid_mcore.evaluation.datasets import MAX_BAD, PLAIN, VIEWS, ProbeData
from nextvid_mcore.evaluation.encoders import Encoder, identity, spread_layers
from nextvid_mcore.evaluation.features import Copies, Extractor, Source, Store, chunks
from nextvid_mcore.evaluation.presets import ProbeConfig
from nextvid_mcore.evaluation.ranks import Ranks
from nextvid_mcore.evaluation.results import score, writable_folder, write_json
from nextvid_mcore.evaluation.stopping import Stop, Stopped

RESULTS, STATE = "results.json", "state.pt"


@dataclass(frozen=True)
class Job:
    """How a probe runs; what doesn't change its result."""

    out: Path
    cache: Path | None = None
    encode_batch: int = 32  # clips in one forward pass of the encoder
    chunk: int = 32  # items whose features are held at a time
    workers: int = 4
    half: bool = False  # bf16 encoder and features: not the same numbers, so it is in the settings too
    save_every: int = 200  # steps
    stop_after: int | None = None  # steps; the same command goes on
    progress: bool = True


class Progress:
    """A bar on the first rank, or nothing."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self.shown = job.progress and ranks.first

    def bar(self, **options: Any):  # noqa: ANN201
        from tqdm import tqdm

        return tqdm(disable=not self.shown, dynamic_ncols=True, **options)


def check_frames(encoder: Encoder, config: ProbeConfig) -> None:
    require(
        config.frames % encoder.frame_multiple == 0,
        f"{encoder.name} takes clips of a multiple of {encoder.frame_multiple} frames, not {config.frames}; "
        "set --frames",
    )


@torch.no_grad()
def check_clips(encoder: Encoder, config: ProbeConfig, device: torch.device) -> None:
    """Let the encoder see one clip of the probe's size, before hours of reading."""
    frames = 1 if encoder.per_frame else config.frames
    try:
        encoder(torch.zeros(1, 3, frames, config.size, config.size, device=device), (encoder.depth - 1,))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{encoder.name} can't take clips of {frames} frames of {config.size} x {config.size} pixels "
            f"({str(error).splitlines()[0]}); set --frames and --size"
        ) from None


def check_readable(unreadable: int, items: int, what: str) -> None:
    if unreadable > MAX_BAD * items:
        raise DataError(
            f"{unreadable} of {items} {what} items can't be read, more than {MAX_BAD:.0%}: no result; repair "
            "the list or the files"
        )


def settings_of(
    config: ProbeConfig, encoder_id: str, train: ProbeData, val: ProbeData, half: bool
) -> dict[str, Any]:
    """All that a result depends on, JSON-able: two probes with equal settings are the same probe."""
    facts = json.loads(json.dumps(dataclasses.asdict(config)))
    facts |= {"encoder_id": encoder_id, "precision": "bf16" if half else "fp32"}
    return facts | {"train_id": train.identity, "val_id": val.identity}


def run(
    config: ProbeConfig, encoder: Encoder, train: ProbeData, val: ProbeData, job: Job, ranks: Ranks
) -> dict[str, Any] | None:
    """The results, also written to OUT/results.json. None: stopped before the end; what was done is kept."""
    with Stop(says=ranks.first) as stop:
        try:
            return _run(config, encoder, train, val, job, ranks, stop)
        except Stopped:
            return None
        except (RuntimeError, DataError):  # loader workers and other ranks were told as well and are gone
            if stop.asked:
                return None
            raise


def _run(
    config: ProbeConfig,
    encoder: Encoder,
    train: ProbeData,
    val: ProbeData,
    job: Job,
    ranks: Ranks,
    stop: Stop,
) -> dict[str, Any] | None:
    began = time.monotonic()
    check_frames(encoder, config)
    encoder_id = identity(encoder)
    settings = settings_of(config, encoder_id, train, val, job.half)
    file = job.out / RESULTS
    if ranks.first:
        writable_folder(job.out)
        if job.cache is not None:
            writable_folder(job.cache, "--cache")
    ranks.barrier()
    if file.exists():
        try:
            done = json.loads(file.read_text())
            before = done["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is no result of a probe ({error!r}); delete it to start again"
            ) from None
        sweep.check_same(before, settings, file)
        return done
    encoder.module.to(ranks.device)
    check_clips(encoder, config, ranks.device)
    layers = spread_layers(encoder.depth, config.layers)
    common = {"half": job.half, "encode_batch": job.encode_batch, "workers": job.workers}
    common |= {"reduce": "tokens" if config.method == "attentive" else "mean"}
    extractors = [Extractor(encoder, data, layers, ranks, **common) for data in (train, val)]
    progress = Progress(job, ranks)
    if config.method == "knn":
        outcome = _knn(config, extractors, job, encoder_id, progress)
    else:
        outcome = _trained(config, extractors, job, encoder_id, settings, progress, stop)
    if outcome is None:
        return None
    items = {"train": len(train), "val": len(val)}
    for result in outcome["tasks"].values():
        check_readable(result["unreadable"], result["items"], "validation")
    minutes = (time.monotonic() - began) / 60
    results = {
        "dataset": config.dataset,
        "method": config.method,
        "encoder": encoder.name,
        "layers": list(layers),
        "seed": config.seed,
        "items": items | outcome.pop("items", {}),
        **outcome,
        "settings": settings,
        "ranks": ranks.size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else ranks.device.type,
        "minutes": round(minutes, 3),
        "version": __version__,
    }
    if ranks.first:
        write_json(file, results)
    ranks.barrier()
    return results


# kNN ---------------------------------------------------------------------------------------------


def _source(extractor: Extractor, job: Job, copies: list[int], encoder_id: str, progress: Progress) -> Source:
    """Features live, or from stores that are filled first."""
    if job.cache is None:
        return extractor
    items = range(len(extractor.data))
    stores = [Store(job.cache, extractor, copy, items, encoder_id) for copy in copies]
    for store in stores:
        store.fill(progress.bar if progress.shown else None)
    return Copies(stores)


def _knn(
    config: ProbeConfig, extractors: list[Extractor], job: Job, encoder_id: str, progress: Progress
) -> dict[str, Any]:
    ranks = extractors[0].ranks
    copy = sweep.reading(config)
    found = []
    for extractor, reading, what in ((extractors[0], PLAIN, "train"), (extractors[1], copy, "val")):
        source = _source(extractor, job, [reading], encoder_id, progress)
        parts = chunks(ranks.share(range(len(extractor.data))), job.chunk)
        rows = source.stream(sweep.Request(reading, part) for part in parts)
        kept = list(progress.bar(iterable=rows, total=len(parts), desc=what, leave=False))
        width = extractor.shape(reading)[2] if not kept else kept[0].features.shape[-1]
        empty = torch.zeros(0, width, device=ranks.device)
        features = torch.cat([empty, *(row.features.float().mean((1, 2)) for row in kept)])
        label = torch.cat([torch.zeros(0, len(extractor.data.tasks), dtype=torch.int64, device=ranks.device),
                           *(row.label for row in kept)])  # fmt: skip
        good = torch.cat([torch.zeros(0, dtype=torch.bool, device=ranks.device), *(r.good for r in kept)])
        found.append((features, label, good))
    features, label, good = (ranks.gather(x) for x in (found[0][0], found[0][1], found[0][2].long()))
    features, label = features[good.bool()], label[good.bool()]
    query, wanted, readable = found[1]
    tasks = {}
    for column, (task, classes) in enumerate(extractors[1].data.tasks.items()):
        guess = knn.classify(features, label[:, column], query[readable], classes, config.k)
        counts = torch.stack([(guess == wanted[readable, column]).sum(), readable.sum()])
        right, read = ranks.sum(counts).tolist()
        items = len(extractors[1].data)
        tasks[task] = score(right, items, items - read, classes) | {"k": min(config.k, len(features))}
    return {"tasks": tasks, "items": {"train_readable": len(features)}}


# Attentive and linear ----------------------------------------------------------------------------


def _trained(
    config: ProbeConfig,
    extractors: list[Extractor],
    job: Job,
    encoder_id: str,
    settings: dict[str, Any],
    progress: Progress,
    stop: Stop,
) -> dict[str, Any] | None:
    first, second = extractors
    ranks, tasks = first.ranks, first.data.tasks
    kept, held = sweep.split(len(first.data), config, getattr(first.data, "paths", None))
    judged_as = sweep.reading(config)
    train_copies = list(range(config.copies)) if config.augmented else [PLAIN]
    require(
        job.cache is None or config.augment is not None,
        "cached features with fresh crops in each epoch would be a copy an epoch; with --cache choose "
        "--augment 0 (none) or a number of copies",
    )
    source = _source(first, job, list(dict.fromkeys([*train_copies, judged_as])), encoder_id, progress)
    width = first.shape(PLAIN)[2]
    trained = sweep.Sweep(config, tasks, width, ranks)
    plan = sweep.Plan(config, kept, job.chunk, ranks)
    bar = progress.bar(total=plan.steps, desc="train", unit="step", leave=False)
    last: list[float] = []

    def report(step: int, losses: Any) -> None:
        bar.n = step
        if losses:
            last[:] = losses
            finite = [x for x in losses if x == x]
            bar.set_postfix(loss=f"{min(finite):.3f}" if finite else "nan", refresh=False)
        bar.update(0)

    with stop.gently():
        done = sweep.train(
            trained, source, plan, job.out / STATE, settings, job.save_every, job.stop_after, stop, report
        )
    bar.close()
    if not done:
        return None
    chunk = max(1, job.chunk // (config.views if judged_as == VIEWS else 1))

    def bar(**options: Any):  # noqa: ANN202
        return progress.bar(desc="judge", leave=False, **options)

    judged = sweep.judge(trained.members, source, held, judged_as, chunk, ranks, bar)
    check_readable(judged[0].unreadable, len(held), "held-out training")
    outcome: dict[str, Any] = {"tasks": {}, "sweep": {}}
    chosen = []
    for number, task in enumerate(tasks):
        rows = [i for i, member in enumerate(trained.members) if member.task == number]
        require(
            any(math.isfinite(judged[i].loss) for i in rows),
            f"{task}: no member of the sweep has a finite loss; lower --lrs {list(config.lrs)} and name "
            "another --out",
        )
        chosen.append(rows[sweep.best([judged[i] for i in rows])])
        outcome["sweep"][task] = [
            {
                "lr": trained.members[i].lr,
                "weight_decay": trained.members[i].weight_decay,
                "holdout_top1": judged[i].top1,
                "holdout_loss": judged[i].loss if math.isfinite(judged[i].loss) else None,
                "chosen": i == chosen[-1],
            }
            for i in rows
        ]
    val_source = _source(second, job, [judged_as], encoder_id, progress)
    members = [trained.members[i] for i in chosen]
    final = sweep.judge(members, val_source, range(len(second.data)), judged_as, chunk, ranks, bar)
    for (task, classes), member, result, i in zip(tasks.items(), members, final, chosen, strict=True):
        outcome["tasks"][task] = score(result.correct, result.items, result.unreadable, classes) | {
            "lr": member.lr,
            "weight_decay": member.weight_decay,
            "holdout_top1": judged[i].top1,
        }
    outcome["items"] = {"trained_on": len(kept), "holdout": len(held)}
    outcome["items"]["holdout_unreadable"] = judged[0].unreadable
    outcome["steps"] = plan.steps
    outcome["probe_parameters"] = sum(p.numel() for p in members[0].module.parameters())
    return outcome
