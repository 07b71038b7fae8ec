"""How a run trains: stages, losses, optimizer, seed and precision (Tables 8 and 12, Eq. 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from nextvid_mcore.config.errors import require


@dataclass(frozen=True)
class StageConfig:
    """One column of Table 8."""

    name: str
    steps: int
    frames: int
    batch: int  # clips per step, over all ranks
    lr_start: float
    lr_end: float
    tau_samples: int = 1  # K
    flow_lr: float | None = None  # of the decoder; None: follows the main learning rate
    # clips of one encoder replica in one forward pass; None: max_micro_batch, or as many fewer as the ranks'
    # shares of a step ask for
    micro_batch: int | None = None
    max_micro_batch: int = 1  # what fits a GPU

    def __post_init__(self) -> None:
        for name in ("steps", "frames", "batch", "tau_samples", "micro_batch", "max_micro_batch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"stage {self.name}: {name} must be positive, got {value}")
        for name in ("lr_start", "lr_end", "flow_lr"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < math.inf,
                f"stage {self.name}: {name} must be 0 or more, got {value}",
            )


@dataclass(frozen=True)
class LossConfig:
    """Eq. 9 with Table 8's weights."""

    flow: float = 0.5
    align: float = 1.0
    tau: Literal["frame", "clip"] = "frame"  # tau is drawn per predicted frame, or once per clip

    def __post_init__(self) -> None:
        for name in ("flow", "align"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"loss {name} is a weight of 0 or more, got {value}")
        require(
            self.flow + self.align > 0, "loss flow and align are both 0: there is nothing to train; raise one"
        )

    def total(self, flow: Any, align: Any) -> Any:
        """The weighted sum of the losses that there are; None stands for one that is switched off."""
        return sum(w * x for w, x in ((self.flow, flow), (self.align, align)) if x is not None)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the EMA (Tables 8 and 12)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.04  # none on biases, norms and other one-dimensional parameters
    clip: float = 1.0  # global norm over all roles
    ema: float = 0.99925  # decay; 0: the reference is the student as it is (Table 12, "w/o EMA")
    max_skipped: int = 10  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        require(0 <= self.ema <= 1, f"optim ema is a decay in [0, 1], got {self.ema}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim {name} lies in [0, 1), got {value}")
        require(self.eps > 0, f"optim eps must be positive, got {self.eps}")
        require(self.weight_decay >= 0, f"optim weight decay must be 0 or more, got {self.weight_decay}")
        require(self.clip > 0, f"optim clip must be positive, got {self.clip}; 1e9 clips nothing")
        require(self.max_skipped >= 1, f"optim max skipped must be 1 or more, got {self.max_skipped}")


@dataclass(frozen=True)
class TrainConfig:
    """The run itself."""

    steps: int | None = None  # stop after this many steps; None: the whole schedule
    start_stage: str | None = None  # begin at this stage's first step (with --init-from)
    global_batch: int | None = None  # overrides every stage's batch
    micro_batch: int | None = None  # overrides every stage's micro-batch
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    # forward and backward pass as one CUDA graph (training/graphs.py); auto: but for FP8 over tensor ranks,
    # and eagerly where recording fails; on: that too, and where it can't be the run ends. VA-VAE's compiled
    # encoder is another graph (targets/replayed.py), unless this is off
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    init_from: str | None = None  # weights only, from a run or a checkpoint
    init_noise: float = 0.0  # std of seeded noise in tensors that start at zero (tests)
    log_every: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train {name} must be positive, got {value}")
        require(self.log_every > 0, f"log every must be positive, got {self.log_every}")
        require(0 <= self.seed < 2**63, f"seed must be 0 or more and below 2**63, got {self.seed}")
        require(self.init_noise >= 0, f"init noise must be 0 or more, got {self.init_noise}")
