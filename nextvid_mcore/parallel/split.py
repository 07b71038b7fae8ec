"""From a layout to what the networks' constructors want to know of it."""

from __future__ import annotations

import torch

from nextvid_mcore.config import RunConfig
from nextvid_mcore.models import fp8
from nextvid_mcore.models.places import Place
from nextvid_mcore.models.specs import Overlap, Split, resolve
from nextvid_mcore.parallel.groups import Layout, RoleGroups
from nextvid_mcore.parallel.placement import Placement, recorded
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.parallel.stages import last_stage_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_split(
    config: RunConfig, layout: Layout, role: str, exchange: bool = False, overlap: Overlap = "never"
) -> Split:
    """The sizes of `layout` with the run's recomputation and precision for `role`.

    exchange: its sequences cross to ranks of another layout.
    overlap: in which passes its linears exchange rows beside their products.
    """
    return Split(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        recompute=config.parallel.recompute,
        last_stage_layers=last_stage_layers(config, layout.pipeline),
        dtype=DTYPES[config.train.precision],
        exchange=exchange,
        overlap=overlap,
        fp8=fp8.settings(config.fp8, role),
    )


def overlap(config: RunConfig, placement: Placement, layout: Layout) -> Overlap:
    """In which passes the linears of a seat exchange rows beside their products, if the GPUs can do it."""
    wanted = config.parallel.tensor_overlap
    if wanted == "off" or not layout.sequence:
        return "never"
    if wanted == "on":
        return "always"
    # `auto` is what was seen to pay: eager passes lose more by waiting for each other's host
    seen = config.train.precision == "bf16" and not config.fp8.used and layout.tensor == 2
    seen &= resolve(config.model.backend)[0] == "te" and recorded(config, placement)
    return "recorded" if seen else "never"


def make_places(config: RunConfig, seats: Seats) -> dict[str, Place]:
    """Split and groups of every role that sits on this rank.

    The encoder's ranks hold a reference even where it is run on others: the EMA is made there.
    """
    places: dict[str, Place] = {}
    separate = seats.placement.separate
    for seat in seats.mine:
        groups = seats.groups[seat.name]

        def place(role: str, groups: RoleGroups = groups) -> Place:
            beside = overlap(config, seats.placement, groups.layout)
            return Place(make_split(config, groups.layout, role, separate, beside), groups.collection)

        for role in seat.roles:
            if role in ("student", "reference"):
                places[role] = place(role)
            elif groups.last_stage:
                places[role] = place(role).unpiped()
        if "student" in seat.roles:
            places["reference"] = place("reference")
    return places
