"""One run: pretrain (the real TrainStep, clips made on the device), then probe the frozen EMA encoder.

`serve` is what a worker process of the queue runs: it imports once and takes one run after another.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import real_clips
import torch
import torch.nn.functional as F
from ablation_rows import Run
from real_clips import RealClips
from torch import Tensor, nn

from nextvid_mcore.config import RunConfig, require
from nextvid_mcore.data.digits_source import DigitClips
from nextvid_mcore.data.loader import ClipBatch
from nextvid_mcore.data.moving_digits import parse_source
from nextvid_mcore.evaluation import sweep
from nextvid_mcore.evaluation.datasets import PLAIN, ProbeBatch, Request
from nextvid_mcore.evaluation.encoders import LAST, Encoder, HubEncoder, PixelEncoder
from nextvid_mcore.evaluation.features import Extractor, Rows, chunks
from nextvid_mcore.evaluation.ranks import Ranks
from nextvid_mcore.evaluation.results import score
from nextvid_mcore.hub import VisionTransformer
from nextvid_mcore.hub.export import encoder_config, to_hub
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.targets.va_vae import VaVae

CURVE = 25  # points of a run's loss curve that are kept
VAE_FRAMES = 2048  # through the small VAE at a time: its frames are 64 times smaller than VA-VAE's
PIXELS = 32  # side of the frames of raw pixels


Clips = DigitClips | RealClips


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def clip_batch(clips: Clips, indices: Sequence[int], frames: int) -> ClipBatch:
    """What the loader gives for the same indices, made where the model is."""
    video, labels = clips.clips(indices, frames)
    label = torch.zeros_like(labels[:, 0])
    for column, classes in enumerate(clips.tasks.values()):
        label = label * classes + labels[:, column]
    return ClipBatch(
        video=video,
        index=torch.tensor(list(indices), dtype=torch.int64),
        label=label,
        static=torch.zeros(len(indices), dtype=torch.bool),
        items=[""] * len(indices),
    )


def source(config: RunConfig, split: str, seed: int, where: torch.device, labelled: bool = False) -> Clips:
    """The clips that a run names, of either split; `labelled`: as a probe wants them."""
    name, size = config.data.manifest, config.model.image_size
    if name.startswith(real_clips.PREFIX):
        file = name.removeprefix(real_clips.PREFIX)
        return RealClips(file, split, size, seed, where, labelled)
    _, side = parse_source(name)
    return DigitClips(split, size, seed, where, side=side)


# Pretraining -------------------------------------------------------------------------------------


def hub_encoder(config: RunConfig, parameters: Iterable[tuple[str, Tensor]] | None) -> VisionTransformer:
    """The plain encoder of a run's shape, with the training model's weights; None: with fresh ones."""
    encoder = VisionTransformer.from_config(encoder_config(config, config.stages[-1].frames))
    if parameters is not None:
        encoder.load_state_dict(to_hub(parameters, config.model.encoder.heads), strict=True)
    return encoder


def _short(row: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None and k != "step")


def pretrain(
    config: RunConfig, steps: int | None = None, name: str = "run", until: float | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """The EMA encoder after `steps` (None: all) of the schedule, and what to report.

    until: train to this time.time() instead, in as many steps as fit; the learning rates run through their
        schedule by the clock.
    """
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.placement import resolve_placement
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    init_distributed()
    seats = build_seats(resolve_placement(config, 1))
    seed_trackers(config.train.seed, seats.home)
    train, schedule = TrainStep(config, seats), Schedule(config)
    if isinstance(train.target, VaVae):
        train.target.chunk = VAE_FRAMES
    clips = source(config, "train", config.train.seed, train.device)
    steps = schedule.total_steps if steps is None else steps
    rows, skipped, timed = [], 0, []
    start = time.time()
    require(until is None or until > start, f"{name} begins {start - (until or 0):.0f} s after its end")
    number, share = 0, 0.0
    while number < steps if until is None else share < 1:
        began = time.perf_counter()
        point = schedule.at(number if until is None else int(share * steps))
        point = dataclasses.replace(point, samples_before=number * point.batch)
        indices = range(point.samples_before, point.samples_before + point.batch)
        micro = point.micro_batch
        result = train.run(
            point, [clip_batch(clips, part, point.stage.frames) for part in chunks(indices, micro)]
        )
        skipped += not result.applied
        found = {"flow": result.loss_flow, "align": result.loss_align, **result.monitors}
        rows.append({"step": number + 1, "loss": result.loss, "grad_norm": result.grad_norm, **found})
        timed.append(time.perf_counter() - began)
        number += 1
        before, share = share, number / steps if until is None else (time.time() - start) / (until - start)
        if int(4 * share) > int(4 * before):
            print(f"    {name} step {number}: {_short(rows[-1])}, {1e3 * timed[-1]:.0f} ms", flush=True)
    steps = number
    last = rows[-max(1, steps // 20) :]
    mean = {
        key: sum(row[key] for row in last) / len(last)
        for key in (rows[-1] if rows else ())
        if key != "step" and rows[-1][key] is not None
    }
    encoder = hub_encoder(config, train.model.reference.named_parameters())
    facts = {
        "final": mean,
        "skipped": skipped,
        "steps": steps,
        "clips": steps * config.stages[0].batch,
        "curve": [rows[round(i * (steps - 1) / (CURVE - 1))] for i in range(CURVE)]
        if steps >= CURVE
        else rows,
        "step_ms": round(1e3 * sorted(timed)[len(timed) // 2], 2) if timed else None,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "feature_std": None,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }
    return HubEncoder("pretrained" if steps else "random", encoder), facts


# The probe ---------------------------------------------------------------------------------------


class Memory:
    """Features of a whole data set, kept on the device; a `Source` of the sweep."""

    def __init__(self, extractor: Extractor, chunk: int = 100) -> None:
        parts = list(
            extractor.encode(extractor.data[Request(PLAIN, part)])
            for part in chunks(range(len(extractor.data)), chunk)
        )
        self.rows = Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        for request in requests:
            where = torch.tensor(request.indices, device=self.rows.label.device)
            yield Rows(*(column[where] for column in self.rows))


class MadeData:
    """Clips made as they are asked for, of another seed than pretraining's, with all their labels.

    "test": of digits, or of parts of a shot, that no training has seen.
    """

    def __init__(self, run: Run, split: str, where: torch.device) -> None:
        self.config = run.probe
        self.items = run.probe.train_items if split == "train" else run.probe.val_items
        self.clips = source(run.config, split, run.probe.seed, where, labelled=True)
        self.tasks = dict(self.clips.tasks)
        self.identity = f"{run.source} {split} {self.items} {run.probe.seed}"

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, request: Request) -> ProbeBatch:
        video, label = self.clips.clips(request.indices, self.config.frames)
        return ProbeBatch(video[:, None, None], label, torch.ones(len(label), dtype=torch.bool))


def probe(encoder: Encoder, run: Run) -> dict[str, Any]:
    """Scores of all labels on held-out clips; the sweep is judged on training clips."""
    config, where = run.probe, device()
    encoder.module.to(where)
    ranks = Ranks(0, 1, where)
    reduce = "tokens" if config.method == "attentive" else "mean"
    data = [MadeData(run, split, where) for split in ("train", "test")]
    tasks = data[0].tasks
    half = where.type == "cuda"
    train, test = (
        Memory(Extractor(encoder, each, LAST, ranks, reduce=reduce, encode_batch=100, half=half))
        for each in data
    )
    trained = sweep.Sweep(config, tasks, train.rows.features.shape[-1], ranks)
    kept, held = sweep.split(config.train_items, config)
    sweep.train(trained, train, sweep.Plan(config, kept, config.batch, ranks))
    judged = sweep.judge(trained.members, train, held, PLAIN, config.batch, ranks)
    chosen = []
    for task in range(len(tasks)):
        own = [i for i, member in enumerate(trained.members) if member.task == task]
        chosen.append(own[sweep.best([judged[i] for i in own])])
    members = [trained.members[i] for i in chosen]
    final = sweep.judge(members, test, range(config.val_items), PLAIN, config.batch, ranks)
    out = {
        task: score(result.correct, result.items, 0, classes)
        | {"lr": trained.members[i].lr, "holdout_top1": judged[i].top1}
        for (task, classes), result, i in zip(tasks.items(), final, chosen, strict=True)
    }
    features = train.rows.features[:200].float()
    return {"tasks": out, "feature_std": float(features.flatten(0, 2).std(0).mean())}


# Supervised from scratch: the ceiling --------------------------------------------------------------


class Labelled(nn.Module):
    """The encoder with a linear classifier a label on the mean of its tokens."""

    def __init__(self, encoder: VisionTransformer, width: int, tasks: dict[str, int]) -> None:
        super().__init__()
        self.encoder, self.norm = encoder, nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in tasks.values())

    def forward(self, video: Tensor) -> list[Tensor]:
        mean = self.norm(self.encoder(video).float().mean(1))
        return [head(mean) for head in self.heads]


def supervised(run: Run) -> dict[str, Any]:
    """As many clips as a pretraining sees, each with its labels, through the same encoder."""
    config, where = run.config, device()
    torch.manual_seed(config.train.seed)
    half = torch.autocast(where.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    test = MadeData(run, "test", where)
    tasks = test.tasks
    model = Labelled(hub_encoder(config, None), config.model.encoder.width, tasks).to(where).train()
    parameters = sum(p.numel() for p in model.encoder.parameters())
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay
    )
    schedule = Schedule(config)
    clips = source(config, "train", config.train.seed, where, labelled=True)
    curve = []
    for number in range(schedule.total_steps):
        point = schedule.at(number)
        indices = range(point.samples_before, point.samples_before + point.batch)
        video, label = clips.clips(indices, point.stage.frames)
        with half:
            logits = model(video.float() / 127.5 - 1)
            loss = sum(F.cross_entropy(x.float(), label[:, i]) for i, x in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = 2 * point.lr
        optimizer.step()
        if number % max(1, schedule.total_steps // CURVE) == 0:
            curve.append({"step": number + 1, "loss": float(loss.detach())})
    right = torch.zeros(len(tasks), dtype=torch.int64)
    model.eval()
    for part in chunks(range(len(test)), 100):
        batch = test[Request(PLAIN, part)]
        with torch.no_grad(), half:
            logits = model(batch.video[:, 0, 0].float() / 127.5 - 1)
        guesses = torch.stack([x.argmax(1) for x in logits], dim=1)
        right += (guesses == batch.label).sum(0).cpu()
    scores = {
        task: score(int(right[i]), len(test), 0, classes) for i, (task, classes) in enumerate(tasks.items())
    }
    return {"tasks": scores, "curve": curve, "parameters": parameters}


# A run -------------------------------------------------------------------------------------------


def execute(run: Run) -> dict[str, Any]:
    """The run's line of results.jsonl, without the commit."""
    began = time.perf_counter()
    facts: dict[str, Any] = {}
    if run.kind == "supervised":
        facts = supervised(run)
        seconds = {"train": time.perf_counter() - began}
    else:
        if run.kind == "pixels":
            encoder: Encoder = PixelEncoder(PIXELS)
        else:
            encoder, facts = pretrain(run.config, None if run.kind == "pretrain" else 0, run.name, run.until)
        trained = time.perf_counter()
        facts |= probe(encoder, run)
        seconds = {"train": trained - began, "probe": time.perf_counter() - trained}
    row = {"row": run.row, "seed": run.seed, "key": run.key, "kind": run.kind, "steps": run.steps}
    row |= {"clips": run.clips, "probe": facts.pop("tasks"), **facts}
    row |= {"seconds": {name: round(value, 2) for name, value in seconds.items()}, "device": device_name()}
    return row | {"settings": run.settings()}


def serve(link: Connection, execute_: Callable[[Run], dict[str, Any]] = execute) -> None:
    """Answer every run that comes down `link` with its result, or with the text of its failure."""
    from nextvid_mcore.parallel.groups import init_distributed

    init_distributed()  # first: Transformer Engine can't be loaded after another copy of cuDNN
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    while (run := link.recv()) is not None:
        try:
            link.send((run, execute_(run), None))
        except Exception:  # noqa: BLE001 (the queue reports it and goes on)
            link.send((run, None, traceback.format_exc()))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
