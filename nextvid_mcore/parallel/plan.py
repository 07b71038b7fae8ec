"""The plan of a run, before anything starts: is it possible, what does each rank hold, what does it cost.

`check` raises ConfigError where a run cannot start; `describe` is the text of `--dry-run`. Parameters and
FLOPs come from flops.py, the layout and its rules from groups.py. Nothing here needs a GPU, data or a
process group.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from nextvid_mcore import flops
from nextvid_mcore.config import RunConfig, StageConfig, TransformerShape, require
from nextvid_mcore.parallel.groups import Layout, resolve_layout, sequences
from nextvid_mcore.parallel.stages import last_stage_layers
from nextvid_mcore.schedule import Schedule

GIB = 2**30
WIDTH = 100
ROLES_SHOWN = 8  # replicas and stages listed one by one; more are summed up


def check(config: RunConfig, world_size: int, dry_run: bool = False) -> Layout:
    """The run's layout. Raises ConfigError, before anything starts, if the run cannot be.

    A dry run needs no GPU, weights or data, so only a real start asks for them.
    """
    from nextvid_mcore.targets import target_channels

    layout = resolve_layout(config, world_size)
    last_stage_layers(config, layout.pipeline)
    Schedule(config)  # the start stage exists, the steps fit
    if config.model.generate:
        target_channels(config)
    if not dry_run:
        _check_machine(config)
    return layout


def _check_machine(config: RunConfig) -> None:
    """What a real start needs of this machine."""
    import torch

    from nextvid_mcore.models.specs import get_backend

    get_backend(config.model.backend)  # te: raises without CUDA or Transformer Engine
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


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the busiest rank of each kind, and the sum."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    features: float
    activations: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def stage_layers(config: RunConfig, layout: Layout) -> list[int]:
    """Encoder layers of each pipeline stage."""
    depth, last = config.model.encoder.depth, last_stage_layers(config, layout.pipeline)
    if last is None:
        return [depth]
    return [(depth - last) // (layout.pipeline - 1)] * (layout.pipeline - 1) + [last]


def rank_memory(config: RunConfig, layout: Layout, stage: int, point: StageConfig) -> RankMemory:
    """An estimate for a rank of pipeline stage `stage` in schedule stage `point`."""
    count = flops.parameters(config.model, flops.target_channels(config))
    size = 2 if config.train.precision == "bf16" else 4
    layers, last = stage_layers(config, layout)[stage], stage == layout.pipeline - 1
    encoder = count.encoder * layers / config.model.encoder.depth / layout.tensor
    others = (count.predictor + count.decoder + count.context_projection) / layout.tensor if last else 0
    trained = encoder + others
    master = 4 if size == 2 else 0  # fp32 weights are their own master copy
    model, micro = config.model, config.train.micro_batch
    tokens = sequences(config, point.frames).get("reference", 0)
    features = micro_batches(config, layout, point) * micro * tokens
    return RankMemory(
        weights=trained * size,
        gradients=trained * 4,
        optimizer=(trained * (master + 8) + encoder * 4) / layout.data,
        reference=encoder * size,
        features=features * model.encoder.width * size if last else 0,
        activations=_activations(config, layout, stage, point) * size,
    )


def _activations(config: RunConfig, layout: Layout, stage: int, point: StageConfig) -> float:
    """Values kept for backward on a rank: `_layer` a token and layer, over the micro-batches in flight."""
    model, clips = config.model, config.train.micro_batch
    length = sequences(config, point.frames)
    in_flight = min(layout.pipeline - stage, micro_batches(config, layout, point))
    kept = length["student"] * stage_layers(config, layout)[stage] * _layer(config, layout, model.encoder)
    if stage == layout.pipeline - 1:
        rows = config.mask.masks * (model.token_frames(point.frames) - 1) * model.tokens_per_frame
        kept += length["predictor"] * model.predictor.depth * _layer(config, layout, model.predictor)
        if model.align:
            kept += rows * 3 * model.encoder.width  # the alignment's prediction, target and difference
        if model.generate:
            kept += rows * point.tau_samples * model.decoder.depth * _layer(config, layout, model.decoder)
    return kept * clips * in_flight


def _layer(config: RunConfig, layout: Layout, shape: TransformerShape) -> float:
    """Values a token leaves in one pre-norm layer: 4 D whole, 4 D + 2 MLP split over the tensor group.

    (Korthikanti et al., 2022, with an attention that keeps no scores and without dropout.)
    """
    if config.parallel.recompute == "full":
        return shape.width / (layout.tensor if layout.sequence else 1)
    whole = 4 * shape.width / (layout.tensor if layout.sequence else 1)
    return whole + (4 * shape.width + 2 * shape.mlp) / layout.tensor


def micro_batches(config: RunConfig, layout: Layout, point: StageConfig) -> int:
    """Forward passes of one replica in a step of `point`."""
    return layout.micro_batches(config.batch(point), config.train.micro_batch)


def describe(config: RunConfig, world_size: int) -> str:
    """The plan in at most 100 columns."""
    layout = check(config, world_size, dry_run=True)
    parts = [_model(config), _schedule(config, layout), _layout(config, layout), _memory(config, layout)]
    return "\n\n".join("\n".join(part) for part in parts)


def _tera(work: float) -> str:
    return f"{work / 1e12:#.3g}" if work else "0"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}M"


def _model(config: RunConfig) -> Iterator[str]:
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
    names = {"pixels": "pixels", "siglip2": "SigLIP2 features", "cosmos": "Cosmos latents"}
    target = names.get(config.target.kind, "VA-VAE latents")
    if model.generate:
        yield f"  target: {target}, {flops.target_channels(config)} values a token"
    else:
        yield "  target: none, there is no generation"
    if config.mask.static:
        counts = " and ".join(str(v) for v in config.mask.counts(model.tokens_per_frame))
        yield f"  masks: {counts} of {model.tokens_per_frame} tokens of a frame stay visible"
    else:
        yield f"  masks: {config.mask.mode}, {len(config.mask.blocks)} a clip"


def _schedule(config: RunConfig, layout: Layout) -> Iterator[str]:
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
        flow = "main" if stage.flow_lr is None else f"{stage.flow_lr:g}"
        yield (
            f"  {stage.name:<10}{stage.steps:>9,}{stage.frames:>8}{batch:>7}"
            f"{micro_batches(config, layout, stage):>15}{stage.tau_samples:>5}{rate:>20}{flow:>9}"
            f"{_tera(clip.total):>12}"
        )
    yield (
        f"  in all {schedule.schedule_steps:,} steps, {_count(samples)} clips, {_count(tokens)} tokens, "
        f"{work:.3g} FLOP"
    )
    start, end = schedule.first_step_of_run, schedule.total_steps
    if (start, end) != (0, schedule.schedule_steps):
        yield f"  this run takes steps {start + 1:,} to {end:,}"
    yield ""
    yield "FLOPs of a clip, in TFLOP (all masks, backward = 2 x forward; none for the reference's)"
    yield "  stage        student  reference  predictor   decoder     model   executed   target (VAE)"
    for stage in config.stages:
        clip, done = flops.clip_flops(config, stage), flops.clip_flops(config, stage, executed=True)
        numbers = (clip.student, clip.reference, clip.predictor, clip.decoder, clip.total, done.total)
        columns = "".join(f"{_tera(x):>{w}}" for x, w in zip(numbers, (9, 11, 11, 10, 10, 11), strict=True))
        yield f"  {stage.name:<11}{columns}{_tera(flops.target_flops(config, stage)):>15}"
    yield "  (model: the paper's step; executed: no context of the last frame, exact mask counts)"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}"


def _ranks(ranks: list[int]) -> str:
    """0-3 for a run, 0, 2, 4 ... else."""
    if len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _layout(config: RunConfig, layout: Layout) -> Iterator[str]:
    world, micro = layout.size, config.train.micro_batch
    yield (
        f"Layout: {world} rank{'s' if world > 1 else ''} = tensor {layout.tensor} x data {layout.data} x "
        f"pipeline {layout.pipeline}, sequence parallelism {'on' if layout.sequence else 'off'}, "
        f"recompute {config.parallel.recompute}"
    )
    for stage in config.stages[:1]:
        yield (
            f"  a step of {stage.name}: {config.batch(stage)} clips = {layout.data} "
            f"replica{'s' if layout.data > 1 else ''} x {micro_batches(config, layout, stage)} "
            f"micro-batches x {micro} clips"
        )
    layers = stage_layers(config, layout)
    first = 0
    for number, count in enumerate(layers):
        held = f"encoder and reference layers {first}-{first + count - 1}"
        if number == layout.pipeline - 1:
            held += ", predictor" + (", decoder, target" if config.model.generate else "")
        yield f"  pipeline stage {number}: {held}"
        first += count
    yield "  who holds what (rank = tensor + data x TP + pipeline x TP x DP):"
    cells = list(itertools.product(range(layout.data), range(layout.pipeline)))
    for data, stage in cells[:ROLES_SHOWN]:
        start = data * layout.tensor + stage * layout.tensor * layout.data
        roles = "all roles" if layout.pipeline == 1 else "encoder, reference"
        if layout.pipeline > 1 and stage == layout.pipeline - 1:
            roles += ", predictor" + (", decoder" if config.model.generate else "")
        split = f", split {layout.tensor} ways" if layout.tensor > 1 else ""
        ranks = _ranks(list(range(start, start + layout.tensor)))
        yield f"    data {data}, pipeline {stage}: rank{'s' * (layout.tensor > 1)} {ranks}: {roles}{split}"
    if len(cells) > ROLES_SHOWN:
        yield f"    and so on: {len(cells)} groups of {layout.tensor} in all"


def _memory(config: RunConfig, layout: Layout) -> Iterator[str]:
    heaviest = max(
        config.stages,
        key=lambda point: rank_memory(config, layout, layout.pipeline - 1, point).total,
    )
    yield f"Memory of a rank in GiB, at its largest (stage {heaviest.name}): an estimate"
    yield "  pipeline  weights  gradients  optimizer  reference  features  activations    total"
    for stage in range(layout.pipeline):
        memory = rank_memory(config, layout, stage, heaviest)
        numbers = [*vars(memory).values(), memory.total]
        columns = "".join(
            f"{x / GIB:>{w}.2f}" for x, w in zip(numbers, (9, 11, 11, 11, 10, 13, 9), strict=True)
        )
        yield f"  {stage:>8}{columns}"
    size = config.train.precision
    master = "fp32 master weights, " if size == "bf16" else ""
    note = (
        f"weights and reference in {size}, gradients in fp32. Optimizer: {master}two moments and the "
        f"encoder's EMA in fp32, over {layout.data} data rank{'s' if layout.data > 1 else ''}. Features: the "
        "reference's, of all micro-batches of a step. "
    )
    if config.parallel.recompute == "full":
        note += "Activations: one width a token and layer (recompute full), over the micro-batches in flight."
    else:
        whole = "/ tensor" if layout.sequence else "on every tensor rank"
        note += (
            f"Activations: 4 width ({whole}) + (4 width + 2 MLP) / tensor values a token and layer, over the "
            "micro-batches in flight."
        )
    note += " Not counted: communication buffers, the target's network, CUDA's own."
    yield from textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")
