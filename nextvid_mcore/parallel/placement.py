"""Who holds what: the placement of encoder, reference, predictor and decoder on the ranks.

A seat is a set of neighbouring ranks with a layout of its own, and the roles that sit there:

    colocated     one seat for the encoder over all ranks; predictor and decoder sit on its last
                  pipeline stage, split as the encoder is or, on request, over more data ranks
    two-groups    the encoder's ranks, then one seat for predictor and decoder
    three-groups  the encoder's, the predictor's, the decoder's

A micro-batch is a stage's `micro_batch` clips of one encoder replica; another seat's replica gets
micro x encoder data / its own data of them. The global sample indices are the same everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig, StageConfig, require
from nextvid_mcore.parallel.groups import Layout, check_layout, resolve_layout

SEPARATE = ("two-groups", "three-groups")


@dataclass(frozen=True)
class Seat:
    """Ranks [first_rank, first_rank + layout.size) and the roles on them."""

    name: str
    roles: tuple[str, ...]  # of student, reference, predictor, decoder
    layout: Layout
    first_rank: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.layout.size)

    @property
    def sees_video(self) -> bool:
        """Whether its roles read clips; a predictor alone reads what others send it."""
        return set(self.roles) != {"predictor"}

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's place in its seat, by tensor, data and pipeline."""
        number, layout = rank - self.first_rank, self.layout
        tensor, number = number % layout.tensor, number // layout.tensor
        return {"tensor": tensor, "data": number % layout.data, "pipeline": number // layout.data}


@dataclass(frozen=True)
class Placement:
    """The seats of a run, in the order in which data flows through them."""

    kind: str
    seats: tuple[Seat, ...]

    @property
    def encoder(self) -> Seat:
        return self.seats[0]

    @property
    def separate(self) -> bool:
        return self.kind in SEPARATE

    @property
    def world(self) -> int:
        return max(seat.ranks.stop for seat in self.seats)

    def seat_of(self, role: str) -> Seat:
        """Where a role sits."""
        return next(seat for seat in self.seats if role in seat.roles)

    def clips(self, seat: Seat, micro_batch: int) -> int:
        """Clips in one replica of `seat` where an encoder replica has `micro_batch`."""
        return micro_batch * self.encoder.layout.data // seat.layout.data

    def warm_up(self, seat: Seat, stage: int, edge: str) -> int:
        """Forward passes that pipeline stage `stage` of `seat` takes ahead of its first backward pass.

        1F1B: one for every stage behind it. An edge of the kind "direct" counts as one of them.
        """
        behind = (len(self.seats) - 1 - self.seats.index(seat)) * self.separate
        return seat.layout.pipeline - 1 - stage + behind * (2 if edge == "direct" else 1)

    def seats_of_rank(self, rank: int) -> list[Seat]:
        return [seat for seat in self.seats if rank in seat.ranks]


def resolve_placement(config: RunConfig, world_size: int) -> Placement:
    """The placement of a run on `world_size` ranks, or a ConfigError with the numbers and the way out."""
    parallel = config.parallel
    _check_settings(config)
    if parallel.placement == "colocated":
        placement = _colocated(config, world_size)
    else:
        placement = _separate(config, world_size)
    require(
        parallel.tensor_overlap != "on" or any(seat.layout.sequence for seat in placement.seats),
        "--parallel.tensor-overlap on is about what sequence parallelism exchanges, and none is here; "
        "add --parallel.sequence and a tensor size of 2 or more, such as --parallel.encoder.tensor 2",
    )
    encoder = placement.encoder.layout
    for seat, stage in itertools.product(placement.seats[1:], config.stages):
        micro = config.given_micro_batch(stage) or _most(config, placement, stage)
        require(
            micro is not None,
            f"{seat.name}: no micro-batch of {stage.max_micro_batch} or less lets encoder data "
            f"{encoder.data} and its own data {seat.layout.data} share the {config.batch(stage)} clips of a "
            f"step (stage {stage.name}); choose other data sizes or --train.global-batch, or a larger "
            f"{config.micro_batch_flag(stage)}",
        )
        total = micro * encoder.data
        require(
            total % seat.layout.data == 0,
            f"{seat.name}: a micro-batch of {micro} x encoder data {encoder.data} = "
            f"{total} clips (stage {stage.name}) can't be shared by data {seat.layout.data} replicas; choose "
            f"one that divides {total}, or a larger --train.micro-batch",
        )
    if placement.separate:
        for before, seat in itertools.pairwise(placement.seats):
            small, large = sorted((before.layout.data, seat.layout.data))
            require(
                large % small == 0,
                f"{before.name} data {before.layout.data} and {seat.name} data {seat.layout.data}: replicas "
                "exchange whole tensors, so one number must be a multiple of the other",
            )
    return placement


def _most(config: RunConfig, placement: Placement, stage: StageConfig) -> int | None:
    """The largest micro-batch up to the stage's own limit that makes equal passes of a step in every seat."""
    share = config.batch(stage) // placement.encoder.layout.data
    wave = placement.encoder.layout.data
    for micro in range(min(stage.max_micro_batch, share), 0, -1):
        if share % micro == 0 and all(micro * wave % seat.layout.data == 0 for seat in placement.seats):
            return micro
    return None


def settled(config: RunConfig, world_size: int) -> tuple[RunConfig, list[str]]:
    """The run with a micro-batch in every stage, and what to say where it is less than fits a GPU.

    Without a micro-batch of its own a stage takes `max_micro_batch`, or the most below it that divides a step
    among the ranks. One that was asked for stays, and is refused where it can't be.
    """
    placement = resolve_placement(config, world_size)
    data, stages, notes = placement.encoder.layout.data, [], []
    for stage in config.stages:
        micro = config.given_micro_batch(stage) or _most(config, placement, stage)
        stages.append(dataclasses.replace(stage, micro_batch=micro))
        if config.given_micro_batch(stage) is None and micro != stage.max_micro_batch:
            notes.append(
                f"stage {stage.name}: micro-batches of {micro}, not {stage.max_micro_batch}: a step has "
                f"{config.batch(stage):,} clips for data parallel {data}"
            )
    return config.altered(stages=tuple(stages)), notes


def _check_settings(config: RunConfig) -> None:
    """Settings that say nothing in this placement are refused, not ignored."""
    parallel, unset = config.parallel, RoleParallel()
    used = {
        "colocated": ("generator",),
        "two-groups": ("generator",),
        "three-groups": ("predictor", "decoder"),
    }[parallel.placement]
    for name in ("generator", "predictor", "decoder"):
        role = getattr(parallel, name)
        require(
            name in used or role == unset,
            f"--parallel.{name} says nothing with --parallel.placement {parallel.placement}, which has "
            f"{' and '.join(used)}; leave it out or choose another placement",
        )
        require(
            role.pipeline in (None, 1),
            f"--parallel.{name}.pipeline {role.pipeline}: only the encoder is pipelined; leave it out",
        )
    require(
        parallel.reference == "encoder" or parallel.placement in SEPARATE,
        "--parallel.reference generator goes with --parallel.placement two-groups or three-groups: "
        "colocated roles share their ranks",
    )
    if parallel.placement in SEPARATE:
        require(
            config.mask.static,
            f"mask mode {config.mask.mode} makes sequences of changing length, which separate groups "
            "don't exchange; use mode fixed or --parallel.placement colocated",
        )
    require(
        parallel.placement != "three-groups" or config.model.generate,
        "--parallel.placement three-groups has a group for the decoder, but model.generate is off; "
        "use two-groups",
    )


def _generator_roles(config: RunConfig) -> tuple[str, ...]:
    return ("predictor", "decoder") if config.model.generate else ("predictor",)


def _colocated(config: RunConfig, world_size: int) -> Placement:
    together = config.parallel.generator == RoleParallel()
    roles = ("student", "reference")
    layout = resolve_layout(config, world_size, roles + (_generator_roles(config) if together else ()))
    asked = config.parallel.generator
    tensor = asked.tensor
    if tensor is None:
        shared = (asked.data or layout.data) // layout.data or 1
        tensor = max(layout.tensor // shared, 1)
    data = layout.tensor * layout.data // tensor
    require(
        layout.tensor % tensor == 0 and asked.data in (None, data),
        f"generator: tensor {asked.tensor or tensor} x data {asked.data or data} can't share the ranks of "
        f"one pipeline stage, tensor {layout.tensor} x data {layout.data}: it takes data {layout.data} "
        f"times a divisor of {layout.tensor}",
    )
    if (tensor, data) == (layout.tensor, layout.data) and layout.pipeline == 1:
        return Placement("colocated", (Seat("all", roles + _generator_roles(config), layout, 0),))
    require(
        tensor == layout.tensor or config.mask.static,
        f"mask mode {config.mask.mode} packs a micro-batch into one row, which the generator can't share "
        f"over data {data}; use mode fixed or leave --parallel.generator out",
    )
    stage = layout.tensor * layout.data
    generator = Layout(tensor, 1, data, sequence=layout.sequence and tensor > 1)
    check_layout(config, generator, _generator_roles(config))
    return Placement(
        "colocated",
        (
            Seat("encoder", roles, layout, 0),
            Seat("generator", _generator_roles(config), generator, layout.size - stage),
        ),
    )


def _separate(config: RunConfig, world_size: int) -> Placement:
    parallel = config.parallel
    names = ("generator",) if parallel.placement == "two-groups" else ("predictor", "decoder")
    others: list[Layout] = []
    for name in names:
        role = getattr(parallel, name)
        tensor, data = role.tensor or 1, role.data or 1
        others.append(Layout(tensor, 1, data, sequence=parallel.sequence and tensor > 1))
    left = world_size - sum(layout.size for layout in others)
    wanted = parallel.encoder
    least = (wanted.tensor or 1) * (wanted.pipeline or 1) * (wanted.data or 1)
    sizes = " + ".join(f"{name} {layout.size}" for name, layout in zip(names, others, strict=True))
    require(
        left >= least,
        f"{world_size} rank{'s are' if world_size > 1 else ' is'} too few for {sizes} and an encoder of "
        f"{least} or more; start at least {least + sum(layout.size for layout in others)} ranks",
    )
    try:
        encoder = resolve_layout(config, left, ("student", "reference"))
    except ConfigError as error:
        raise ConfigError(
            f"of {world_size} ranks, {sizes} leave {left} for the encoder: {error}, or "
            f"give {' and '.join(names)} more: {', '.join(f'--parallel.{name}.data' for name in names)}"
        ) from None
    reference = ("reference",)
    roles = {"generator": _generator_roles(config), "predictor": ("predictor",), "decoder": ("decoder",)}
    with_generator = parallel.reference == "generator" and config.model.align
    seats = [Seat("encoder", ("student",) if with_generator else ("student", *reference), encoder, 0)]
    for name, layout in zip(names, others, strict=True):
        check_layout(config, layout, roles[name])
        extra = reference if with_generator and "predictor" in roles[name] else ()
        seats.append(Seat(name, extra + roles[name], layout, seats[-1].ranks.stop))
    return Placement(parallel.placement, tuple(seats))


def unrecordable(config: RunConfig, placement: Placement) -> str | None:
    """Why micro-batches of this run can't be CUDA graphs (training/graphs.py) on any machine, or None."""
    layout = placement.encoder.layout
    if placement.separate or layout.pipeline > 1:
        return (
            f"micro-batches overlap between ranks (placement {config.parallel.placement}, "
            f"pipeline {layout.pipeline})"
        )
    if not config.mask.static:
        return f"mask mode {config.mask.mode} changes the number of tokens from clip to clip"
    if config.parallel.recompute in ("core_attn", "full"):
        return f"recompute {config.parallel.recompute} reads the state of the random generators"
    return None


def recorded(config: RunConfig, placement: Placement) -> bool:
    """Whether micro-batches are CUDA graphs on a GPU that has the memory for it."""
    if config.train.cuda_graphs == "off" or unrecordable(config, placement) is not None:
        return False
    # `auto` is what was seen on GPUs: FP8 over tensor ranks has run eagerly alone
    return config.train.cuda_graphs == "on" or placement.encoder.layout.tensor == 1 or not config.fp8.used
