"""The seats of a placement as process groups: what this rank belongs to, and the grids of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from nextvid_mcore.parallel.groups import RoleGroups, build_groups
from nextvid_mcore.parallel.placement import Placement, Seat


@dataclass(frozen=True)
class Seats:
    """A placement with its groups, as seen from this rank."""

    placement: Placement
    groups: dict[str, RoleGroups]  # by the seat's name; those of other ranks' seats have no collection

    @property
    def mine(self) -> list[Seat]:
        """The seats that this rank sits in; the first is the one it loads clips for."""
        return self.placement.seats_of_rank(dist.get_rank())

    @property
    def home(self) -> RoleGroups:
        """The groups of this rank's first seat."""
        return self.groups[self.mine[0].name]

    @property
    def apart(self) -> bool:
        """Whether every rank is a replica by itself, whose passes wait for no other rank."""
        layout = self.placement.encoder.layout
        return len(self.placement.seats) == 1 and layout.tensor == layout.pipeline == 1

    def of(self, role: str) -> RoleGroups | None:
        """The groups in which this rank works on `role` (student, reference, predictor, decoder)."""
        for seat in self.mine:
            if role in seat.roles:
                groups = self.groups[seat.name]
                last = groups.last_stage or role in ("student", "reference")
                return groups if last else None
        return None


def build_seats(placement: Placement, timeout: float = 600.0) -> Seats:
    """Create every seat's groups. Every rank of the world must call it.

    Args:
        timeout: seconds a collective may hang before it fails.
    """
    groups: dict[str, RoleGroups] = {}
    for seat in placement.seats:
        groups[seat.name] = build_groups(seat.layout, seat.first_rank, timeout)
    return Seats(placement, groups)
