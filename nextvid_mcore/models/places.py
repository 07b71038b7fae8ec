"""Where a role sits: how it is split there, and the process groups it works in."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection

from nextvid_mcore.models.specs import Split


@dataclass(frozen=True)
class Place:
    """One role's split and groups, as its rank sees them."""

    split: Split
    groups: ProcessGroupCollection

    @property
    def sequence(self) -> bool:
        """Whether sequences are split over the tensor group."""
        return self.split.sequence and self.split.tensor > 1

    def unpiped(self) -> Place:
        """The same ranks as a stage of its own sees them: predictor and decoder are not pipelined."""
        groups = copy.copy(self.groups)
        groups.pp = self.groups.cp  # without context parallelism, this rank alone
        split = dataclasses.replace(self.split, pipeline=1, last_stage_layers=None)
        return Place(split, groups)


def together(split: Split, groups: ProcessGroupCollection) -> dict[str, Place]:
    """Every role on the same ranks; of several pipeline stages the last has predictor and decoder."""
    place = Place(split, groups)
    places = {"student": place, "reference": place}
    if groups.pp.rank() == groups.pp.size() - 1:
        places |= {"predictor": place.unpiped(), "decoder": place.unpiped()}
    return places
