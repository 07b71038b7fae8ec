"""The plan of a run, before anything starts: is it possible, what does each rank hold, what does it cost.

`check` raises ConfigError where a run cannot start; `describe` is the text of `--dry-run`: model and schedule
from flops.py, the placement from placement.py and seating.py, memory from memory.py. Nothing here needs a
GPU, data or a process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from nextvid_mcore import flops
from nextvid_mcore.config import RunConfig, TransformerShape, require
from nextvid_mcore.parallel import memory, seating
from nextvid_mcore.parallel.balance import run_speed
from nextvid_mcore.parallel.fp8_shapes import check_fp8
from nextvid_mcore.parallel.placement import Placement, resolve_placement, settled, unrecordable
from nextvid_mcore.parallel.stages import last_stage_layers
from nextvid_mcore.schedule import Schedule

WIDTH = 100
H100, SHARE = 989e12, 0.4  # its dense bf16 FLOP/s, and about what the step has reached with VA-VAE beside it

TARGETS = {
    "pixels": "pixels",
    "va_vae": "VA-VAE latents",
    "siglip2": "SigLIP2 features",
    "cosmos": "Cosmos latents",
}


def check(config: RunConfig, world_size: int, dry_run: bool = False) -> Placement:
    """The run's placement. Raises ConfigError, before anything starts, if the run cannot be.

    A dry run needs no GPU, weights or data, so only a real start asks for them.
    """
    from nextvid_mcore.targets import target_channels

    config, _ = settled(config, world_size)
    placement = resolve_placement(config, world_size)
    last_stage_layers(config, placement.encoder.layout.pipeline)
    check_fp8(config, placement)
    if config.train.cuda_graphs == "on":
        reason = unrecordable(config, placement)
        require(reason is None, f"train cuda_graphs on: {reason}; use --train.cuda-graphs auto or off")
    Schedule(config)  # the start stage exists, the steps fit
    if config.model.generate:
        target_channels(config)
    if not dry_run:
        _check_machine(config)
    return placement


def _check_machine(config: RunConfig) -> None:
    """What a real start needs of this machine."""
    import torch

    from nextvid_mcore.data import nvdec
    from nextvid_mcore.data.labelled import build_labelled
    from nextvid_mcore.models import fp8
    from nextvid_mcore.models.specs import get_backend

    if config.data.decoder == "dali":
        nvdec.check()
    if config.eval.knn_every:
        build_labelled(config)
    require(
        not config.wandb.enabled or find_spec("wandb") is not None,
        "wandb is not installed: bash scripts/install.sh train,wandb (or pip install wandb), or --no-wandb",
    )
    get_backend("te" if config.fp8.used else config.model.backend)  # raises if te can't run
    require(
        config.train.cuda_graphs != "on" or torch.cuda.is_available(),
        "train cuda_graphs on: there is no CUDA device; use --train.cuda-graphs auto or off",
    )
    fp8.check_gpu(config.fp8)
    require(
        config.train.precision != "bf16" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(),
        "this GPU has no bf16; use --train.precision fp32",
    )
    require(
        not config.model.generate
        or config.target.kind != "va_vae"
        or (config.target.checkpoint and config.target.statistics),
        "target va_vae needs its weights: --target.checkpoint FILE --target.statistics latents_stats.pt "
        "(or generate pixels: --target.kind pixels)",
    )


def describe(config: RunConfig, world_size: int) -> str:
    """The plan in at most 100 columns."""
    placement = check(config, world_size, dry_run=True)
    config, notes = settled(config, world_size)
    parts = [
        _model(config),
        _schedule(config, placement, notes),
        seating.seats(config, placement),
        seating.holdings(config, placement),
        seating.waiting(config, placement, WIDTH),
        memory.table(config, placement, WIDTH),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _tera(work: float) -> str:
    return f"{work / 1e12:#.3g}" if work else "0"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}M"


def _model(config: RunConfig) -> Iterator[str]:
    from nextvid_mcore.models.specs import backend_note

    model = config.model
    count = flops.parameters(model, flops.target_channels(config))
    yield f"Model {config.recipe}"

    def shape(x: TransformerShape) -> str:
        return f"width {x.width}, depth {x.depth}, {x.heads} heads, MLP {x.mlp}"

    idle = "" if model.align else ", nor run: there is no alignment"
    reads = "" if model.condition == "concat" else f", condition {model.condition}"
    rows = [
        ("encoder", count.encoder, shape(model.encoder)),
        ("reference", count.encoder, f"EMA of the encoder, not trained{idle}"),
        ("predictor", count.predictor_of_paper, f"{shape(model.predictor)}, with the context's projection"),
    ]
    if model.generate:
        rows.append(("decoder", count.decoder, f"{shape(model.decoder)}{reads}"))
    for name, number, text in rows:
        named = f"{name} {_millions(number)}"
        yield f"  {named:<22}{text}"
    if model.context == "joint":
        yield "  the predictor's context and queries are one sequence: no context isolation"
    yield f"  {'trained ' + _millions(count.student + count.predictor + count.decoder)}"
    yield (
        f"  clips of {model.image_size} x {model.image_size} pixels in patches of {model.patch_size} x "
        f"{model.patch_size} x {model.tubelet_size}; {model.tokens_per_frame} tokens a frame"
    )
    if model.generate:
        yield f"  target: {TARGETS[config.target.kind]}, {flops.target_channels(config)} values a token"
    else:
        yield "  target: none, there is no generation"
    yield f"  {backend_note(model.backend)} on this machine"
    if config.mask.static:
        counts = " and ".join(str(v) for v in config.mask.counts(model.tokens_per_frame))
        yield f"  masks: {counts} of {model.tokens_per_frame} tokens of a frame stay visible"
    else:
        yield f"  masks: {config.mask.mode}, {len(config.mask.blocks)} a clip"


def _schedule(config: RunConfig, placement: Placement, notes: list[str]) -> Iterator[str]:
    schedule = Schedule(config)
    yield "Schedule"
    yield (
        "  stage         steps  frames  batch  micro-batches  tau       learning rate  flow LR  TFLOP/clip"
    )
    samples = tokens = work = 0.0
    for stage in config.stages:
        batch, clip = config.batch(stage), flops.clip_flops(config, stage)
        clips = stage.steps * batch
        samples += clips
        tokens += clips * config.model.token_frames(stage.frames) * config.model.tokens_per_frame
        work += clips * clip.total
        rate = f"{stage.lr_start:g} -> {stage.lr_end:g}"
        passes = f"{memory.micro_batches(config, placement, stage)} x {config.micro_batch(stage)}"
        flow = "main" if stage.flow_lr is None else f"{stage.flow_lr:g}"
        yield (
            f"  {stage.name:<10}{stage.steps:>9,}{stage.frames:>8}{batch:>7}"
            f"{passes:>15}{stage.tau_samples:>5}{rate:>20}{flow:>9}"
            f"{_tera(clip.total):>12}"
        )
    yield (
        f"  in all {schedule.schedule_steps:,} steps, {_count(samples)} clips, {_count(tokens)} tokens, "
        f"{work:.3g} FLOP"
    )
    start, end = schedule.first_step_of_run, schedule.total_steps
    if (start, end) != (0, schedule.schedule_steps):
        yield f"  this run takes steps {start + 1:,} to {end:,}"
    hours = _hours(config, placement, schedule)
    if hours >= 1:
        each = hours / placement.world
        wall = f"{each / 24:,.1f} days" if each > 48 else f"{each:,.1f} hours"
        wall = f"{60 * each:,.0f} minutes" if each < 1 else wall
        gpus = f"{placement.world} GPU{'s' * (placement.world > 1)}"
        waits = " and the waits below" * (len(placement.seats) > 1)
        rate = f"{SHARE:.0%} of an H100's bf16 peak{waits}"
        yield f"  about {hours:,.0f} GPU-hours, {wall} on {gpus}, at {rate}"
    yield from (f"  {note}" for note in notes)
    if config.eval.knn_every:
        yield f"  {flops.knn_note(config)}"
    yield ""
    yield "FLOPs of a clip, in TFLOP (all masks, backward = 2 x forward; none for the reference's)"
    yield "  stage        student  reference  predictor   decoder     model   executed   target (VAE)"
    for stage in config.stages:
        clip, done = flops.clip_flops(config, stage), flops.clip_flops(config, stage, executed=True)
        numbers = (clip.student, clip.reference, clip.predictor, clip.decoder, clip.total, done.total)
        columns = "".join(f"{_tera(x):>{w}}" for x, w in zip(numbers, (9, 11, 11, 10, 10, 11), strict=True))
        yield f"  {stage.name:<11}{columns}{_tera(flops.target_flops(config, stage)):>15}"
    yield "  (model: the paper's step; executed: no context of the last frame, exact mask counts)"


def _hours(config: RunConfig, placement: Placement, schedule: Schedule) -> float:
    """GPU-hours of the steps that this run takes, which need not be the whole schedule's."""
    taken = config.altered(stages=schedule.stages_of_run(), train={"steps": None, "start_stage": None})
    work = sum(
        stage.steps
        * config.batch(stage)
        * (flops.clip_flops(config, stage, executed=True).total + flops.target_flops(config, stage))
        for stage in taken.stages
    )
    return work / (SHARE * H100) / 3600 / run_speed(taken, placement)


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}"
