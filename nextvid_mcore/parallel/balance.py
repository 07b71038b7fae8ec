"""Who waits for whom: the seats of a placement as a chain of stages, timed by executed FLOPs.

Every rank is taken as equally fast and sending as free, so what is left is what the placement itself costs:
a seat with less work than the heaviest waits (imbalance), and a chain has to fill and to drain (bubble).
The order of the work is the engines': the 1F1B schedule over the chain, a pipelined reference ahead of it as
a pass of its own, any other one micro-batch by micro-batch.

A FLOP of a narrow network takes longer, since more of its time goes into moving memory: `NARROW`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nextvid_mcore import flops
from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig, StageConfig
from nextvid_mcore.parallel.placement import Placement, resolve_placement
from nextvid_mcore.parallel.stages import stage_layers

TOLERATED = 0.2  # share of a step that a seat may wait without a warning
SIZES_TRIED = 12  # of a seat, nearest to its share of the FLOPs
# The time of a FLOP of predictor and decoder in those of the encoder is (its width / theirs) ** NARROW: about
# 2.3 times for 1408 against 384, 1.9 for 1024, on H200s in bf16, compiled (benchmarks/RESULTS.md, 2026-11-22)
NARROW = 0.65


@dataclass(frozen=True)
class Link:
    """A stage of the chain: ranks that do the same on their shares of a micro-batch.

    ahead, forward, backward: the time of one rank, in FLOPs of the encoder.
    """

    name: str  # of its seat
    stage: int | None  # of several pipeline stages
    ranks: int
    ahead: float  # in the reference's own pass
    forward: float
    backward: float
    warm_up: int  # forward passes ahead of the first backward pass
    flops: float = 0.0  # of one rank

    @property
    def work(self) -> float:
        return self.ahead + self.forward + self.backward


@dataclass(frozen=True)
class Balance:
    """A step of one schedule stage."""

    links: tuple[Link, ...]
    micro_batches: int
    span: float  # the step's time, in FLOPs of the encoder

    def imbalance(self, link: Link) -> float:
        """Share of the step that a link would wait in an endless chain."""
        return self.micro_batches * (self._heaviest - link.work) / self.span

    def bubble(self) -> float:
        """Share of the step that goes into filling, draining and passes that can't overlap."""
        return 1 - self.micro_batches * self._heaviest / self.span

    def waits(self, link: Link) -> float:
        return 1 - self.micro_batches * link.work / self.span

    @property
    def _heaviest(self) -> float:
        return max(link.work for link in self.links)

    @property
    def total(self) -> float:
        """Time of all ranks on a micro-batch of all replicas."""
        return sum(link.ranks * link.work for link in self.links)

    @property
    def flops(self) -> float:
        """FLOPs of all ranks on a micro-batch of all replicas."""
        return sum(link.ranks * link.flops for link in self.links)

    @property
    def ranks(self) -> int:
        return sum(link.ranks for link in self.links)

    @property
    def ceiling(self) -> float:
        """Speed relative to the same ranks with equal work, bubble aside."""
        return self.total / self.ranks / self._heaviest

    @property
    def speed(self) -> float:
        """Speed relative to the same ranks all busy, as under colocated data parallelism."""
        return self.micro_batches * self.total / self.ranks / self.span


def balance(
    config: RunConfig,
    placement: Placement,
    point: StageConfig,
    target: bool = True,
    narrow: float = NARROW,
) -> Balance:
    """How a step of schedule stage `point` shares out.

    Args:
        target: with the frozen target's FLOPs, if known.
        narrow: 0: every FLOP takes the same time.
    """
    links = chain(config, placement, point, target, narrow)
    count = placement.encoder.layout.micro_batches(config.batch(point), config.micro_batch(point))
    return Balance(links, count, span(links, count))


def chain(
    config: RunConfig,
    placement: Placement,
    point: StageConfig,
    target: bool = True,
    narrow: float = NARROW,
) -> tuple[Link, ...]:
    """The stages of the chain, in the order of the data."""
    work = flops.clip_flops(config, point, executed=True)
    latents = flops.target_flops(config, point) if target else 0.0
    clips = config.micro_batch(point) * placement.encoder.layout.data
    again = 1 / 3 if config.parallel.recompute == "full" else 0.0  # of forward and backward
    encoder = placement.encoder
    own_pass = "reference" in encoder.roles and not (placement.separate and encoder.layout.pipeline == 1)
    links = []
    for stage, layers in enumerate(stage_layers(config, encoder.layout.pipeline)):
        last = stage == encoder.layout.pipeline - 1
        share, roles = layers / config.model.encoder.depth, set(encoder.roles)
        if last and not placement.separate:
            roles = roles.union(*(seat.roles for seat in placement.seats))
        student = share * work.student
        trained = student + _generator(config, roles, work, narrow)
        reference = share * work.reference if "reference" in roles else 0.0
        fixed = latents if "decoder" in roles else 0.0
        each = clips / (encoder.layout.tensor * encoder.layout.data)
        links.append(
            Link(
                encoder.name,
                stage if encoder.layout.pipeline > 1 else None,
                encoder.layout.tensor * encoder.layout.data,
                each * reference * own_pass,
                each * (trained / 3 + reference * (not own_pass) + fixed),
                each * trained * (2 / 3 + again),
                placement.warm_up(encoder, stage, config.parallel.edge),
                each * (student + _generator(config, roles, work) + reference + fixed),
            )
        )
    for seat in placement.seats[1:] if placement.separate else ():
        roles = set(seat.roles)
        trained = _generator(config, roles, work, narrow)
        fixed = work.reference if "reference" in seat.roles else 0.0
        fixed += latents if "decoder" in seat.roles else 0.0
        each = clips / seat.layout.size
        links.append(
            Link(
                seat.name,
                None,
                seat.layout.size,
                0.0,
                each * (trained / 3 + fixed),
                each * trained * (2 / 3 + again),
                placement.warm_up(seat, 0, config.parallel.edge),
                each * (_generator(config, roles, work) + fixed),
            )
        )
    return tuple(links)


def _generator(config: RunConfig, roles: set[str], work: flops.RoleFlops, narrow: float = 0.0) -> float:
    """Time of predictor and decoder where they are among `roles`; FLOPs where `narrow` is 0."""
    model, time = config.model, 0.0
    for role in roles & {"predictor", "decoder"}:
        time += getattr(work, role) * (model.encoder.width / getattr(model, role).width) ** narrow
    return time


def span(links: Sequence[Link], count: int) -> float:
    """The time of `count` micro-batches, in FLOPs of the encoder."""
    steady = 4 * (links[0].warm_up + 1) + 8  # from here on every further one costs the same
    if count > steady:
        most, heaviest = _simulate(links, steady), max(link.work for link in links)
        return most + (count - steady) * max(most - _simulate(links, steady - 1), heaviest)
    return _simulate(links, count)


def _simulate(links: Sequence[Link], count: int) -> float:
    """1F1B, after the reference's forward-only pass on the links that have one."""
    clock = [0.0] * len(links)
    arrival = [0.0] * count
    for i, link in enumerate(links):
        if link.ahead:
            for k in range(count):
                clock[i] = arrival[k] = max(clock[i], arrival[k]) + link.ahead
    done: dict[tuple[str, int, int], float] = {}  # (kind, link, micro-batch) -> when
    todo = [_order(link.warm_up, count) for link in links]
    while any(todo):
        for i, link in enumerate(links):
            while todo[i]:
                kind, k = todo[i][0]
                source = (kind, i - 1 if kind == "F" else i + 1, k)
                if 0 <= source[1] < len(links) and source not in done:
                    break
                length = link.forward if kind == "F" else link.backward
                clock[i] = done[kind, i, k] = max(clock[i], done.get(source, 0.0)) + length
                todo[i].pop(0)
    return max(clock)


def _order(warm_up: int, count: int) -> list[tuple[str, int]]:
    """What a link that takes `warm_up` forward passes first does, in its order."""
    warm = min(warm_up, count)
    order = [("F", k) for k in range(warm)]
    for k in range(count - warm):
        order += [("F", warm + k), ("B", k)]
    return order + [("B", k) for k in range(count - warm, count)]


def run_speed(config: RunConfig, placement: Placement) -> float:
    """`Balance.speed` over the whole schedule."""
    found = [(stage.steps, balance(config, placement, stage)) for stage in config.stages]
    busy = sum(steps * b.micro_batches * b.total / b.ranks for steps, b in found)
    return busy / sum(steps * b.span for steps, b in found)


def best_split(config: RunConfig, world: int) -> tuple[RunConfig, float]:
    """The fastest placement of the same kind on `world` ranks by FLOPs, and its `run_speed`.

    Tried are sizes near each seat's share of the FLOPs and both places of the reference; the encoder's
    tensor and pipeline sizes stay, and so do the micro-batch's clips.
    """
    best, speed = config, run_speed(config, resolve_placement(config, world))
    for parallel in _candidates(config, world):
        other = dataclasses.replace(config, parallel=parallel)
        try:
            found = run_speed(other, resolve_placement(other, world))
        except ConfigError:
            continue
        if found > speed + 1e-9:
            best, speed = other, found
    return best, speed


def _candidates(config: RunConfig, world: int) -> Iterator:
    names = ("generator",) if config.parallel.placement == "two-groups" else ("predictor", "decoder")
    stage = max(config.stages, key=lambda stage: stage.steps * config.batch(stage))
    work = flops.clip_flops(config, stage, executed=True)
    latents = flops.target_flops(config, stage)
    predictor, decoder = (_generator(config, {role}, work, NARROW) for role in ("predictor", "decoder"))
    total = work.student + work.reference + predictor + decoder + latents
    for reference in ("encoder", "generator") if config.model.align else ("encoder",):
        first = work.reference * (reference == "generator")
        wanted = {
            "generator": first + predictor + decoder + latents,
            "predictor": first + predictor,
            "decoder": decoder + latents,
        }
        ideal = [world * wanted[name] / total for name in names]
        for sizes in itertools.product(*(_near(x, world) for x in ideal)):
            if sum(sizes) >= world:
                continue
            seats = {}
            for name, size in zip(names, sizes, strict=True):
                tensor = getattr(config.parallel, name).tensor or 1
                if size % tensor:
                    break
                seats[name] = RoleParallel(
                    tensor=getattr(config.parallel, name).tensor,
                    data=size // tensor if size > tensor else None,
                )
            else:
                encoder = dataclasses.replace(config.parallel.encoder, data=None)
                yield dataclasses.replace(config.parallel, encoder=encoder, reference=reference, **seats)


def _near(ideal: float, world: int) -> list[int]:
    return sorted(range(1, world), key=lambda size: abs(math.log(size / max(ideal, 0.5))))[:SIZES_TRIED]


def flags(config: RunConfig) -> str:
    """A placement as settings of the command line."""
    parallel = config.parallel
    words = [f"--parallel.placement {parallel.placement}"]
    for seat in ("encoder", "generator", "predictor", "decoder"):
        for name, value in vars(getattr(parallel, seat)).items():
            if value is not None and (value > 1 or name == "data"):
                words.append(f"--parallel.{seat}.{name} {value}")
    if parallel.reference == "generator":
        words.append("--parallel.reference generator")
    return " ".join(words)
