"""Where clips come from and how they are cut (Section 4.1, Table 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextvid_mcore.config.errors import require

MOVING_DIGITS = "moving-digits"  # a manifest that is made and not read (data/digits_source.py)


def is_made(manifest: str | None) -> bool:
    """Whether `manifest` is moving-digits[:SIZE[:SIDE]] and not a folder."""
    return manifest is not None and manifest.partition(":")[0] == MOVING_DIGITS


@dataclass(frozen=True)
class SetConfig:
    """One data set of the mixture (Table 6)."""

    name: str
    weight: float

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data set {self.name}: weight must be positive, got {self.weight}")


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from and how they are cut."""

    manifest: str | None = None  # a folder or file that tools/build_manifest.py wrote
    eval_manifest: str | None = None
    sets: tuple[SetConfig, ...] = ()  # empty: every set of the manifest, by its number of items
    decoder: Literal["decord", "dali"] = "decord"  # of videos; dali: on the GPU (data/nvdec.py)
    fps: float = 4.0
    clips_per_video: int = 1  # clips taken from one opened file
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_aspect: tuple[float, float] = (0.75, 1.35)
    flip: float = 0.5
    workers: int = 8  # loader processes of a rank; 0 decodes in the training process
    prefetch: int = 2
    timeout: float = 300.0  # seconds a worker may take for one batch
    max_bad_share: float = 0.05  # of the samples of the last `bad_window`; above it the run stops
    bad_window: int = 1000

    def __post_init__(self) -> None:
        require(self.fps > 0, f"fps must be positive, got {self.fps}")
        require(self.clips_per_video >= 1, f"clips per video must be 1 or more, got {self.clips_per_video}")
        require(self.workers >= 0, f"workers must be 0 or more, got {self.workers}")
        require(self.prefetch >= 1, f"prefetch must be 1 or more, got {self.prefetch}")
        require(self.timeout > 0, f"data timeout must be positive, got {self.timeout}")
        require(self.bad_window >= 1, f"bad window must be 1 or more, got {self.bad_window}")
        require(0 <= self.flip <= 1, f"flip is a probability, got {self.flip}")
        require(0 <= self.max_bad_share <= 1, f"max bad share lies in [0, 1], got {self.max_bad_share}")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"crop scale must be a rising range in (0, 1], got {self.crop_scale}")
        low, high = self.crop_aspect
        require(0 < low <= high, f"crop aspect must be a rising positive range, got {self.crop_aspect}")
