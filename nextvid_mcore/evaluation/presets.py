"""What a probe is told, and the paper's four benchmarks (Tables 9 and 10) as presets.

Table 10's "FPS" of 4, 4 and 2 is read as the step from one frame to the next, as V-JEPA 2's configurations
of the same benchmarks have it (frame_step 4, 4, 2 with the same frames, segments and views); `rate_is="fps"`
reads it as frames a second. The paper gives no learning rates and weight decays: the sweeps are V-JEPA 2's.
Its input range, mean 0.5 and deviation 0.5, is that of every encoder here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from nextvid_mcore.config import ConfigError, require

LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WEIGHT_DECAYS = (0.01, 0.1, 0.4, 0.8)
METHODS = ("attentive", "linear", "knn")


@dataclass(frozen=True)
class ProbeConfig:
    """One benchmark and how it is probed. Everything that a result depends on besides encoder and data."""

    dataset: str
    method: Literal["attentive", "linear", "knn"] = "attentive"
    # data (Tables 9 and 10)
    classes: int | None = None  # None: the largest training label + 1
    train_items: int | None = None  # as Table 9 has it, rounded; of moving digits: made
    val_items: int | None = None
    segments: int = 1  # clips of a video, spread over its length, their tokens concatenated
    views: int = 1  # crops along the long side, of a validation clip; their probabilities are averaged
    frames: int = 16
    rate: float = 4  # see rate_is
    rate_is: Literal["step", "fps"] = "step"
    size: int = 256
    side: int | None = None  # of moving digits in pixels; None: 28 / 64 of a frame
    augment: int | None = None  # differently cropped copies of the training set; 0: none; None: one an epoch
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.0  # mirrored motion is another class in SSv2
    # classifier and training (Table 10)
    batch: int = 192  # over all ranks
    epochs: int = 20
    layers: int = 1  # encoder layers, their tokens concatenated
    heads: int = 16
    mlp: bool = False  # V-JEPA 2's MLP behind the cross-attention; the paper names the attention alone
    lrs: tuple[float, ...] = LRS
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    holdout: float = 0.05  # share of the training items on which the sweep is judged
    k: int = 20  # neighbours
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("segments", "views", "frames", "size", "batch", "epochs", "layers", "heads", "k"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")
        require(
            self.side is None or (self.dataset == "moving_digits" and self.side >= 1),
            f"side {self.side}: it is that of moving digits, 1 pixel or more",
        )
        require(self.method in METHODS, f"method {self.method!r}: choose one of {', '.join(METHODS)}")
        require(0 < self.rate < math.inf, f"rate must be positive, got {self.rate}")
        require(0 <= self.flip <= 1, f"flip is a share in [0, 1], got {self.flip}")
        require(
            self.rate_is == "fps" or float(self.rate).is_integer(),
            f"a frame step is a whole number, got {self.rate}; give another, or --rate-is fps",
        )
        require(0 < self.holdout < 1, f"holdout is a share in (0, 1), got {self.holdout}")
        require(self.augment is None or self.augment >= 0, f"augment must be 0 or more, got {self.augment}")
        require(
            len(self.lrs) > 0 and len(self.weight_decays) > 0,
            "the sweep is empty: give --lrs and --weight-decays",
        )
        for name in ("lrs", "weight_decays"):
            values = getattr(self, name)
            require(all(0 <= v < math.inf for v in values), f"{name} must be 0 or more, got {values}")
            require(len(set(values)) == len(values), f"{name} names a value twice: {values}")
        require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")

    @property
    def copies(self) -> int:
        """Versions of the training set: epoch e reads copy e % copies; copy 0 of `augment=0` is unchanged."""
        return self.epochs if self.augment is None else max(1, self.augment)

    @property
    def augmented(self) -> bool:
        return self.augment is None or self.augment > 0


PRESETS: dict[str, ProbeConfig] = {
    "k400": ProbeConfig(
        "k400", classes=400, train_items=241_000, val_items=20_000, segments=8, views=3, rate=4, batch=192
    ),
    "in1k": ProbeConfig(
        "in1k",
        classes=1000,
        train_items=1_280_000,
        val_items=50_000,
        batch=384,
        flip=0.5,
        lrs=(2e-3, 1.5e-3, 1e-3, 5e-4),
        weight_decays=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    ),
    "ssv2": ProbeConfig(
        "ssv2", classes=174, train_items=169_000, val_items=24_000, segments=2, views=3, rate=4, batch=96
    ),
    "diving48": ProbeConfig(
        "diving48",
        classes=48,
        train_items=15_000,
        val_items=2_000,
        segments=4,
        views=3,
        frames=32,
        rate=2,
        batch=48,
        epochs=100,
        layers=4,
    ),
    # Not the paper's: digit and direction probed at once, on clips made as they are needed.
    "moving_digits": ProbeConfig(
        "moving_digits",
        train_items=20_000,
        val_items=10_000,
        size=64,
        augment=0,
        batch=256,
        epochs=20,
        lrs=(1e-2, 3e-3, 1e-3, 3e-4),
        weight_decays=(0.01, 0.1),
    ),
}


def preset(name: str, **changes: Any) -> ProbeConfig:
    """A preset with some of its fields changed; `custom` has Table 10's K400 column without its sizes."""
    if name == "custom":
        base = ProbeConfig("custom", segments=1, views=1)
    elif name in PRESETS:
        base = PRESETS[name]
    else:
        raise ConfigError(f"no probe data set {name!r}; there are {', '.join(PRESETS)} and custom")
    return dataclasses.replace(base, **changes)
