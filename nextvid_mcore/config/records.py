"""What a run writes and measures on its way: checkpoints, evaluation, profiles, wandb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextvid_mcore.config.errors import require


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; one is always written at the end
    keep: int = 3  # newest checkpoints that stay; 0: all
    asynchronous: bool = False  # write while training goes on; costs a copy of what is saved in host memory

    def __post_init__(self) -> None:
        require(self.every > 0, f"checkpoint every must be positive, got {self.every}")
        require(self.keep >= 0, f"checkpoint keep must be 0 (all) or more, got {self.keep}")


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # steps; 0: never
    samples: int = 256  # the first of the validation manifest
    batch: int = 4  # clips of one replica in one forward pass
    tau_bins: int = 4
    knn_every: int = 0  # steps from one online kNN to the next; 0: never. Needs labels in the eval manifest
    knn_samples: int = 1024  # of its clips, kept in memory; two of three are neighbours

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval every must be 0 (never) or more, got {self.every}")
        for name in ("samples", "batch", "tau_bins"):
            value = getattr(self, name)
            require(value > 0, f"eval {name} must be positive, got {value}")
        require(self.knn_every >= 0, f"eval knn every must be 0 (never) or more, got {self.knn_every}")
        require(self.knn_samples >= 6, f"eval knn samples must be 6 or more, got {self.knn_samples}")


@dataclass(frozen=True)
class ProfileConfig:
    steps: str | None = None  # "10-12" or "10": record these steps on every rank, into OUT/profile

    def __post_init__(self) -> None:
        if self.steps is not None:
            parts = self.steps.split("-")
            require(
                len(parts) in (1, 2) and all(part.isascii() and part.isdigit() for part in parts),
                f"profile steps are given as 10-12 or 10, got {self.steps!r}",
            )
            first, last = self.span
            require(1 <= first <= last, f"profile steps run from 1 up, first to last, got {self.steps!r}")

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last step to record, counted from 1 as in metrics.jsonl."""
        if self.steps is None:
            return None
        first, _, last = self.steps.partition("-")
        return int(first), int(last or first)


@dataclass(frozen=True)
class WandbConfig:
    enabled: bool = False
    project: str = "nextvid"
    name: str | None = None
    mode: Literal["offline", "online"] = "offline"
