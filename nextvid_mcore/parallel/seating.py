"""A placement drawn: its seats, what every rank holds, what crosses between seats, and who waits for whom.

Text for `--dry-run`; tools/draw_placement.py makes a picture of the same facts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nextvid_mcore import flops
from nextvid_mcore.config import RunConfig, StageConfig
from nextvid_mcore.parallel.balance import TOLERATED, Balance, Link, balance, best_split, flags, run_speed
from nextvid_mcore.parallel.memory import micro_batches, trained, value_bytes
from nextvid_mcore.parallel.placement import Placement, Seat
from nextvid_mcore.parallel.stages import stage_layers

ROWS = 16  # ranks listed one by one; more are summed up by seat and pipeline stage
ROLES = ("student", "reference", "predictor", "decoder")


@dataclass(frozen=True)
class Crossing:
    """What goes from one seat to another: bytes of a clip each way, or once a step."""

    source: str
    target: str
    what: str
    forward: int
    backward: int = 0
    per_step: bool = False


def crossings(config: RunConfig, placement: Placement, point: StageConfig) -> list[Crossing]:
    """What the seats of a separate placement send each other; nothing crosses between colocated roles."""
    if not placement.separate:
        return []
    model, n = config.model, config.model.tokens_per_frame
    p, size = model.token_frames(point.frames) - 1, value_bytes(config)
    names = [seat.name for seat in placement.seats]
    context = p * sum(config.mask.counts(n)) * model.predictor.width
    features = 0
    found = []
    if model.align and placement.seat_of("reference").name == names[0]:
        features = p * n * model.encoder.width  # of the predicted frames
    elif model.align:
        weights = flops.parameters(model, flops.target_channels(config)).encoder
        found.append(Crossing(*names[:2], "the reference's weights", weights * size, per_step=True))
    what = "context and reference features" if features else "context"
    forward = (context + features) * size
    # megatron-core's bridge returns the gradient of all that it brought; the features' is zero
    back = context * size if config.parallel.edge == "direct" else forward
    found.insert(0, Crossing(*names[:2], what, forward, back))
    if placement.kind == "three-groups":
        z = config.mask.masks * p * n * model.predictor.width * size
        found.append(Crossing(*names[1:], "predictions (z)", z, z))
    return found


def seats(config: RunConfig, placement: Placement) -> Iterator[str]:
    """The seats, their steps, and what crosses."""
    world = placement.world
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    modes = (
        f"sequence parallelism {'on' if placement.encoder.layout.sequence else 'off'}, "
        f"recompute {config.parallel.recompute}"
    )
    if len(placement.seats) == 1:
        yield f"Placement colocated: {ranks} = {_product(placement.encoder)}"
    else:
        yield f"Placement {placement.kind}: {ranks}"
        for seat in placement.seats:
            stretch = _ranks(seat.ranks)
            yield f"  {seat.name:<10} {stretch:<12} {_product(seat):<36} {', '.join(seat.roles)}"
    yield f"  {modes}"
    stage = config.stages[0]
    count, replicas = micro_batches(config, placement, stage), placement.encoder.layout.data
    micro = config.micro_batch(stage)
    yield (
        f"  a step of {stage.name}: {config.batch(stage)} clips = {count} "
        f"micro-batch{'es' if count > 1 else ''} x {micro * replicas}"
    )
    if len(placement.seats) > 1:
        shares = ", ".join(f"{seat.name} {placement.clips(seat, micro)}" for seat in placement.seats)
        yield f"  clips of a micro-batch in one replica: {shares}"
    for each in crossings(config, placement, stage):
        amount = f"{readable(each.forward)} {'a step' if each.per_step else 'a clip'}"
        back = f", {readable(each.backward)} of gradient back" if each.backward else ""
        yield f"  {each.source} -> {each.target}: {each.what}, {amount}{back}"


def _product(seat: Seat) -> str:
    layout = seat.layout
    return f"tensor {layout.tensor} x data {layout.data} x pipeline {layout.pipeline}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def readable(count: float) -> str:
    """Bytes in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def holdings(config: RunConfig, placement: Placement) -> Iterator[str]:
    """Role x rank: coordinates, layers of every role, trained parameters."""
    split = any(seat.layout.tensor > 1 for seat in placement.seats)
    yield f"Layers of every role on every rank{' (/ n: n ranks share each layer)' if split else ''}"
    header = f"  {'rank':>9} {'tensor':>7} {'data':>7} {'pipeline':>9}  "
    yield header + "".join(f"{role:>11}" for role in ROLES) + f"{'trained':>13}"
    for group in _groups(placement):
        rank, seats_here = group[0], placement.seats_of_rank(group[0])
        if placement.separate and rank == seats_here[0].first_rank and rank:
            yield "  " + "-" * 90
        columns = [
            [seats_here[0].coordinates(r)[dim] for r in group] for dim in ("tensor", "data", "pipeline")
        ]
        stretch = str(rank) if len(group) == 1 else f"{rank}-{group[-1]}"
        where = [f"{min(c)}" if min(c) == max(c) else f"{min(c)}-{max(c)}" for c in columns]
        cells = "".join(f"{_cell(config, placement, rank, role):>11}" for role in ROLES)
        count = sum(
            sum(trained(config, seat, seat.coordinates(rank)["pipeline"]).values()) for seat in seats_here
        )
        coordinates = f"{where[0]:>7} {where[1]:>7} {where[2]:>9}"
        yield f"  {stretch:>9} {coordinates}  {cells}{count / 1e6:>12,.1f}M"
    if placement.seat_of("reference") is not placement.encoder:
        yield "  (in brackets: the EMA is made here and sent to the ranks that run it)"
    generator = placement.seats[-1]
    if not placement.separate and generator.layout.data > placement.encoder.layout.data:
        yield (
            f"  predictor and decoder: tensor {generator.layout.tensor} x data {generator.layout.data} over "
            "the ranks of a pipeline stage"
        )


def _groups(placement: Placement) -> Iterator[list[int]]:
    """Ranks that share a row: each by itself, or all of a seat's pipeline stage."""
    if placement.world <= ROWS:
        yield from ([rank] for rank in range(placement.world))
        return
    chain = placement.seats if placement.separate else placement.seats[:1]
    for seat in chain:
        width = seat.layout.tensor * seat.layout.data
        for first in range(seat.first_rank, seat.ranks.stop, width):
            yield list(range(first, first + width))


def _cell(config: RunConfig, placement: Placement, rank: int, role: str) -> str:
    """Layers of `role` on `rank`, and their split."""
    model = config.model
    if role in ("predictor", "decoder"):
        layers, seat = getattr(model, role).depth, _seat_with(placement, rank, role)
    else:
        seat = _seat_with(placement, rank, role)
        held = seat or (_seat_with(placement, rank, "student") if role == "reference" else None)
        if held is None:
            return "."
        stage = held.coordinates(rank)["pipeline"]
        layers = stage_layers(config, held.layout.pipeline)[stage]
        if seat is None:
            return f"({_split(layers, held)})"
        if role == "reference" and not model.align:
            return f"({_split(layers, held)})"
    last = seat is not None and seat.coordinates(rank)["pipeline"] == seat.layout.pipeline - 1
    if seat is None or (role in ("predictor", "decoder") and not last):
        return "."
    return _split(layers, seat)


def _split(layers: int, seat: Seat) -> str:
    return f"{layers} / {seat.layout.tensor}" if seat.layout.tensor > 1 else str(layers)


def _seat_with(placement: Placement, rank: int, role: str) -> Seat | None:
    return next((seat for seat in placement.seats_of_rank(rank) if role in seat.roles), None)


def waiting(config: RunConfig, placement: Placement, width: int) -> Iterator[str]:
    """Every seat's share of the FLOPs, and how long it waits for the others in every schedule stage."""
    found = {stage.name: balance(config, placement, stage) for stage in config.stages}
    if all(len(step.links) == 1 for step in found.values()):
        yield "Every rank does the same work: none waits for another seat"
        return
    known = any(flops.target_flops(config, stage) > 0 for stage in config.stages)
    yield (
        f"Who waits for whom, by executed FLOPs{' (target network too)' * known}; those of narrow networks "
        "take longer"
    )
    yield (
        f"  {'stage':<10}{'micro-batches':>14}  {'seat':<13}{'ranks':>6}{'share':>8}{'TFLOP a rank':>14}"
        f"{'imbalance':>11}{'bubble':>8}{'waits':>7}"
    )
    for name, step in found.items():
        for i, link in enumerate(step.links):
            head = f"  {name:<10}{step.micro_batches:>14}" if i == 0 else " " * 26
            work = step.micro_batches * link.flops / 1e12
            yield (
                f"{head}  {_link(link):<13}{link.ranks:>6}{link.ranks * link.flops / step.flops:>8.0%}"
                f"{_amount(work):>14}{step.imbalance(link):>11.0%}{step.bubble():>8.0%}{step.waits(link):>7.0%}"
            )
    speed = run_speed(config, placement)
    yield (
        f"  over the schedule {speed:.2f} of the speed of {placement.world} ranks that never wait, "
        "as colocated data replicas are"
    )
    yield from _warnings(config, placement, found, speed, width)


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _link(link: Link) -> str:
    return link.name if link.stage is None else f"{link.name} {link.stage}"


def _warnings(
    config: RunConfig, placement: Placement, found: dict[str, Balance], speed: float, width: int
) -> Iterator[str]:
    """Who waits too long, and what would be better."""
    worst: dict[str, list[str]] = {}
    for name, step in found.items():
        for link in step.links:
            if step.waits(link) > TOLERATED:
                worst.setdefault(_link(link), []).append(f"{step.waits(link):.0%} of {name}")
    if not worst:
        return
    text = "; ".join(f"{seat} waits {', '.join(when)}" for seat, when in worst.items())
    yield from _wrap(f"WARNING: over {TOLERATED:.0%}: {text}.", width)
    if placement.separate:
        yield from _wrap(_better(config, placement, speed), width)
    if max(step.bubble() for step in found.values()) > TOLERATED / 2:
        yield from _wrap(
            "The bubble shrinks with more micro-batches: a smaller --train.micro-batch or a larger batch"
            + (", or fewer pipeline stages." if placement.encoder.layout.pipeline > 1 else "."),
            width,
        )


def _better(config: RunConfig, placement: Placement, speed: float) -> str:
    other, best = best_split(config, placement.world)
    if best < speed + 0.01:
        return (
            f"No other split of {placement.world} ranks into {placement.kind} with this micro-batch waits "
            "less; "
            "colocated roles never wait for each other: --parallel.placement colocated."
        )
    return f"Better balanced, {best:.2f}: {flags(other)}"


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
