"""How a run is laid out over ranks (parallel/placement.py reads it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextvid_mcore.config.errors import require


@dataclass(frozen=True)
class RoleParallel:
    """How one role is split. None: derived from the world size or from the encoder."""

    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"parallel {name} must be 1 or more, got {value}")


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of a run (parallel/placement.py)."""

    placement: Literal["colocated", "two-groups", "three-groups"] = "colocated"
    encoder: RoleParallel = RoleParallel()
    generator: RoleParallel = RoleParallel()  # predictor and decoder in one group
    predictor: RoleParallel = RoleParallel()  # three-groups
    decoder: RoleParallel = RoleParallel()  # three-groups
    reference: Literal["encoder", "generator"] = "encoder"  # where the reference encoder runs
    edge: Literal["direct", "bridge"] = "bridge"  # between seats: parallel/direct_edge.py, megatron-core's
    sequence: bool = False  # sequence parallelism inside the tensor groups
    # rows that sequence parallelism exchanges travel beside the products (models/overlapped.py); auto: in
    # recorded passes of two tensor ranks in bf16, where one GPU reaches the other's memory; on: in all passes
    tensor_overlap: Literal["auto", "on", "off"] = "auto"
    # in the backward pass: norms and GELUs, attention, or whole layers
    recompute: Literal["none", "pieces", "core_attn", "full"] = "none"
    timeout: float = 600.0  # seconds without progress after which the run ends (parallel/watchdog.py)

    def __post_init__(self) -> None:
        require(self.timeout > 0, f"parallel timeout must be positive, got {self.timeout}")
