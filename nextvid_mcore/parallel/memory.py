"""What a rank holds, and how much memory that takes: an estimate, by formula.

A rank may sit in several seats (a colocated generator that is split in its own way); what they take adds up.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from nextvid_mcore import flops
from nextvid_mcore.config import RunConfig, StageConfig
from nextvid_mcore.parallel.groups import Layout, sequences
from nextvid_mcore.parallel.placement import Placement, Seat, recorded
from nextvid_mcore.parallel.stages import stage_layers
from nextvid_mcore.schedule import Schedule

GIB = 2**30
LARGEST = 79.6 * GIB  # what a GPU of "80 GB" has in all


@dataclass(frozen=True)
class RankMemory:
    """Bytes of each kind on a rank."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    reference: float = 0.0
    features: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: RankMemory) -> RankMemory:
        return RankMemory(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def micro_batches(config: RunConfig, placement: Placement, point: StageConfig) -> int:
    """Forward passes of a replica in a step of `point`, the same in every seat."""
    return placement.encoder.layout.micro_batches(config.batch(point), config.micro_batch(point))


def trained(config: RunConfig, seat: Seat, stage: int) -> dict[str, float]:
    """Trained parameters of a rank of `seat` by role."""
    count = flops.parameters(config.model, flops.target_channels(config))
    layers = stage_layers(config, seat.layout.pipeline)
    found: dict[str, float] = {}
    if "student" in seat.roles:
        found["student"] = count.encoder * layers[stage] / sum(layers)
        if stage == len(layers) - 1:
            found["student"] += count.context_projection
    if stage == len(layers) - 1:
        found |= {role: getattr(count, role) for role in ("predictor", "decoder") if role in seat.roles}
    return {role: number / seat.layout.tensor for role, number in found.items()}


def rank_memory(config: RunConfig, placement: Placement, rank: int, point: StageConfig) -> RankMemory:
    """An estimate for one rank in schedule stage `point`."""
    parts = (_seat(config, placement, seat, rank, point) for seat in placement.seats_of_rank(rank))
    return sum(parts, RankMemory())


def _seat(config: RunConfig, placement: Placement, seat: Seat, rank: int, point: StageConfig) -> RankMemory:
    layout, stage = seat.layout, seat.coordinates(rank)["pipeline"]
    size = value_bytes(config)
    by_role = trained(config, seat, stage)
    parameters = sum(by_role.values())
    quantised = sum(2 * number for role, number in by_role.items() if role in config.fp8.used)
    count = flops.parameters(config.model, flops.target_channels(config))
    layers = stage_layers(config, layout.pipeline)
    encoder = count.encoder * layers[stage] / sum(layers) / layout.tensor
    ema = encoder if "student" in seat.roles else 0.0
    master = 4 if size == 2 else 0  # fp32 weights are their own master copy
    return RankMemory(
        weights=parameters * size + quantised,
        gradients=parameters * 4,
        optimizer=(parameters * (master + 8) + ema * 4) / layout.data,
        # where the student is, its EMA is made, whoever runs it
        reference=encoder * (size + ("reference" in seat.roles and "reference" in config.fp8.used))
        if {"student", "reference"} & set(seat.roles)
        else 0.0,
        features=_features(config, placement, seat, stage, point) * size,
        activations=_activations(config, placement, seat, stage, point),
    )


def _in_flight(config: RunConfig, placement: Placement, seat: Seat, stage: int, point: StageConfig) -> int:
    """Micro-batches whose backward a stage of the chain still waits for, under 1F1B."""
    ahead = placement.warm_up(seat, stage, config.parallel.edge)
    return min(ahead + 1, micro_batches(config, placement, point))


def _features(config: RunConfig, placement: Placement, seat: Seat, stage: int, point: StageConfig) -> float:
    """Values of the reference's features that wait for the alignment loss."""
    if not config.model.align:
        return 0.0
    waiting = 0
    if "reference" in seat.roles and stage == seat.layout.pipeline - 1:
        # a pass over the whole step, but where every micro-batch's is in its recording
        ahead = (not placement.separate or seat.layout.pipeline > 1) and not recorded(config, placement)
        waiting = micro_batches(config, placement, point) if ahead else 1
    elif "predictor" in seat.roles and placement.separate:
        waiting = _in_flight(config, placement, seat, stage, point)
    tokens = sequences(config, point.frames)["reference"]
    return waiting * placement.clips(seat, config.micro_batch(point)) * tokens * config.model.encoder.width


def _activations(
    config: RunConfig, placement: Placement, seat: Seat, stage: int, point: StageConfig
) -> float:
    """Bytes kept for backward on a rank, over the micro-batches in flight."""
    model, layout = config.model, seat.layout
    length, size = sequences(config, point.frames), value_bytes(config)
    rows = config.mask.masks * (model.token_frames(point.frames) - 1) * model.tokens_per_frame
    kept = 0.0
    if "student" in seat.roles:
        layers = stage_layers(config, layout.pipeline)[stage]
        kept += length["student"] * layers * layer_bytes(config, layout, "student")
    if stage == layout.pipeline - 1:
        if "predictor" in seat.roles:
            layer = length["predictor"] * layer_bytes(config, layout, "predictor")
            if model.context == "isolated":
                layer += length["student"] * key_bytes(config, layout, "predictor")
            kept += model.predictor.depth * layer
            # the alignment's prediction, and its target in fp32, one for all masks
            kept += rows * (size + 4 / config.mask.masks) * model.encoder.width * model.align
        if "decoder" in seat.roles and model.generate:
            tokens, channels = rows * point.tau_samples, flops.target_channels(config)
            kept += tokens * model.decoder.depth * layer_bytes(config, layout, "decoder")
            # input and output maps; velocity, noise, the two mixed and their difference in fp32
            kept += tokens * (size * (3 * model.decoder.width + channels) + 16 * channels)
    return (
        kept
        * placement.clips(seat, config.micro_batch(point))
        * _in_flight(config, placement, seat, stage, point)
    )


def value_bytes(config: RunConfig) -> int:
    """Of a weight or an activation in the run's precision."""
    return 2 if config.train.precision == "bf16" else 4


def layer_bytes(config: RunConfig, layout: Layout, role: str) -> float:
    """Bytes a token leaves in one layer of `role`.

    What stands on the residual stream is whole on every tensor rank (or split with the sequence); queries,
    keys, values, attention's output and the MLP's inside are split. A linear keeps its input for its weight's
    gradient: in FP8 where it runs so, and not at all where `recompute pieces` makes it again. After
    Korthikanti et al., 2022, with an attention that keeps no scores and without dropout.
    """
    model, size, mode = config.model, value_bytes(config), config.parallel.recompute
    shape, recipe = model.shape(role), config.fp8.of(role)
    split = layout.tensor if layout.sequence else 1
    if mode == "full":
        return size * shape.width / split
    linear = 1 if recipe != "none" else size
    normed = 0 if mode == "pieces" and recipe == "none" else linear
    fused = recipe == "delayed" and config.fp8.fused and layout.tensor == 1  # models/fp8_mlp.py
    activated = 0 if mode == "pieces" and (recipe == "none" or fused) else linear
    gated = 2 * size if role == "decoder" else 0  # what AdaLN's gates multiply
    whole = 2 * size + 2 * normed + gated
    queries = size if role == "predictor" and model.context == "isolated" else 3 * size
    inside = queries + size + (recipe == "delayed")
    kept = whole * shape.width / split
    kept += (inside * shape.width + (size + activated) * shape.mlp) / layout.tensor
    if role == "decoder" and model.condition == "cross_self":
        kept += key_bytes(config, layout, role) + linear * shape.width / split
    return kept


def key_bytes(config: RunConfig, layout: Layout, role: str) -> float:
    """Bytes a token that is attended to, and no query, leaves in one layer: key and value.

    In FP8 every layer's linear has a copy of its own of the token too.
    """
    if config.parallel.recompute == "full":
        return 0.0
    width = config.model.shape(role).width
    copy = width / (layout.tensor if layout.sequence else 1) if config.fp8.of(role) != "none" else 0.0
    return 2 * value_bytes(config) * width / layout.tensor + copy


def kinds(placement: Placement) -> Iterator[tuple[str, list[int]]]:
    """Ranks that hold the same, with a name: of each seat, by pipeline stage."""
    for seat in placement.seats:
        width = seat.layout.tensor * seat.layout.data
        for stage in range(seat.layout.pipeline):
            ranks = list(range(seat.first_rank + stage * width, seat.first_rank + (stage + 1) * width))
            seats = placement.seats_of_rank(ranks[0])
            if seats[0] is not seat:
                continue  # a colocated generator: said with the encoder's last stage
            name = " + ".join(each.name for each in seats)
            yield (f"{name} {stage}" if seat.layout.pipeline > 1 else name), ranks


def table(config: RunConfig, placement: Placement, width: int) -> Iterator[str]:
    """The memory of every kind of rank, in text of `width` columns."""

    def most(point: StageConfig) -> float:
        return max(rank_memory(config, placement, ranks[0], point).total for _, ranks in kinds(placement))

    taken = {stage.name for stage in Schedule(config).stages_of_run()}
    heaviest = max((stage for stage in config.stages if stage.name in taken), key=most)
    yield f"Memory of a rank in GiB, at its largest (stage {heaviest.name}): an estimate"
    names = [field.name for field in dataclasses.fields(RankMemory)]
    columns = [(name, len(name) + 2) for name in [*names, "total"]]
    yield f"  {'seat':<22}" + "".join(f"{name:>{w}}" for name, w in columns)
    full = []
    for name, ranks in kinds(placement):
        memory = rank_memory(config, placement, ranks[0], heaviest)
        yield f"  {name:<22}" + "".join(f"{getattr(memory, n) / GIB:>{w}.2f}" for n, w in columns)
        if memory.total > LARGEST:
            full.append(f"{name} {memory.total / GIB:.0f}")
    if full:
        less = {"none": "pieces", "pieces": "full", "core_attn": "full"}.get(config.parallel.recompute)
        way = f", or try --parallel.recompute {less}" if less else ""
        yield from textwrap.wrap(
            f"WARNING: no GPU of 80 GB has that: {', '.join(full)}. Lower "
            f"{config.micro_batch_flag(heaviest)}{way}.",
            width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False,
        )  # fmt: skip
    yield from textwrap.wrap(
        _note(config, placement), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _note(config: RunConfig, placement: Placement) -> str:
    size = config.train.precision
    master = "fp32 master weights, " if size == "bf16" else ""
    shared = " and ".join(
        f"{seat.layout.data}{f' ({seat.name})' if len(placement.seats) > 1 else ''}"
        for seat in placement.seats
    )
    note = (
        f"weights and reference in {size}, gradients in fp32. Optimizer: {master}two moments and the "
        f"encoder's EMA in fp32, over {shared} data rank{'s' if shared != '1' else ''}. Features: the "
        "reference's, until the alignment loss needs them. "
    )
    if placement.seat_of("student") is not placement.seat_of("reference"):
        note += "The encoder's ranks keep a reference too: the EMA is made there. "
    if config.fp8.used:
        note += "Weights in FP8 beside them, for two directions (the reference's for one). "
    if config.parallel.recompute == "full":
        note += "Activations: one width a token and layer (recompute full), over the micro-batches in flight."
    else:
        note += "Activations: what every layer keeps for its backward pass, over the micro-batches in flight."
    return note + (
        " Not counted: what the backward pass itself needs, communication buffers, the target's network, "
        "CUDA's own."
    )
