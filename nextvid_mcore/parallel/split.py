"""From a layout to what the networks' constructors want to know of it."""

from __future__ import annotations

import torch

from nextvid_mcore.config import RunConfig
from nextvid_mcore.models import fp8
from nextvid_mcore.models.places import Place
from nextvid_mcore.models.specs import Split
from nextvid_mcore.parallel.groups import Layout, RoleGroups
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.parallel.stages import last_stage_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_split(config: RunConfig, layout: Layout, role: str, exchange: bool = False) -> Split:
    """The sizes of `layout` with the run's recomputation and precision for `role`.

    exchange: its sequences cross to ranks of another layout.
    """
    return Split(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        recompute=config.parallel.recompute,
        last_stage_layers=last_stage_layers(config, layout.pipeline),
        dtype=DTYPES[config.train.precision],
        exchange=exchange,
        overlap=config.parallel.tensor_overlap and layout.sequence,
        fp8=fp8.settings(config.fp8, role),
    )


def make_places(config: RunConfig, seats: Seats) -> dict[str, Place]:
    """Split and groups of every role that sits on this rank.

    The encoder's ranks hold a reference even where it is run on others: the EMA is made there.
    """
    places: dict[str, Place] = {}
    separate = seats.placement.separate
    for seat in seats.mine:
        groups = seats.groups[seat.name]

        def place(role: str, groups: RoleGroups = groups) -> Place:
            return Place(make_split(config, groups.layout, role, separate), groups.collection)

        for role in seat.roles:
            if role in ("student", "reference"):
                places[role] = place(role)
            elif groups.last_stage:
                places[role] = place(role).unpiped()
        if "student" in seat.roles:
            places["reference"] = place("reference")
    return places
