"""A whole run, and how its parts fit together."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from nextvid_mcore.config.data import DataConfig
from nextvid_mcore.config.errors import require, require_choices
from nextvid_mcore.config.fp8 import Fp8Config
from nextvid_mcore.config.model import MaskConfig, ModelConfig, TargetConfig
from nextvid_mcore.config.parallel import ParallelConfig
from nextvid_mcore.config.records import CheckpointConfig, EvalConfig, ProfileConfig, WandbConfig
from nextvid_mcore.config.training import LossConfig, OptimConfig, StageConfig, TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `nextvid_mcore.recipes` holds the named ones."""

    recipe: str
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    mask: MaskConfig = MaskConfig()
    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    fp8: Fp8Config = Fp8Config()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self) -> None:
        require_choices(self)
        require(len(self.stages) > 0, "a run needs at least one stage")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stage names must differ, got {names}")
        for lone, other in (("align", "generate"), ("flow", "align")):
            require(
                getattr(self.model, other) or getattr(self.loss, lone) > 0,
                f"loss {lone} is 0 and {other} is off, so there is nothing to train; raise loss {lone} or "
                f"switch {other} on",
            )
        for stage in self.stages:
            self.model.token_frames(stage.frames)
        if self.mask.static:
            self.mask.counts(self.model.tokens_per_frame)
        self._check_fp8()

    def _check_fp8(self) -> None:
        named = ", ".join(f"{role} {recipe}" for role, recipe in self.fp8.used.items())
        if not named:
            return
        require(
            self.model.backend != "local",
            f"fp8 ({named}) runs in Transformer Engine's linears; use --model.backend te, not local",
        )
        require(
            self.train.precision == "bf16",
            f"fp8 ({named}) goes with --train.precision bf16, not {self.train.precision}",
        )
        require(
            self.parallel.tensor_overlap != "on",
            f"fp8 ({named}): --parallel.tensor-overlap on cuts products of bf16; leave it or FP8 out",
        )
        require(
            self.mask.static,
            f"fp8 ({named}) needs sequences of one length, a multiple of 16, and mask mode {self.mask.mode} "
            "changes it from clip to clip; use --mask.mode fixed",
        )

    def batch(self, stage: StageConfig) -> int:
        """Clips per step of a stage."""
        return self.train.global_batch or stage.batch

    def micro_batch(self, stage: StageConfig) -> int:
        """Clips of one encoder replica in one forward pass of a stage (parallel/placement.py: settled)."""
        return self.given_micro_batch(stage) or stage.max_micro_batch

    def given_micro_batch(self, stage: StageConfig) -> int | None:
        """The same where somebody said it, else None."""
        return self.train.micro_batch or stage.micro_batch

    def micro_batch_flag(self, stage: StageConfig) -> str:
        """The setting that decides it."""
        if self.train.micro_batch is not None:
            return "--train.micro-batch"
        return f"--stages.{self.stages.index(stage)}.micro-batch"

    def altered(self, **parts: Any) -> RunConfig:
        """With other settings: `altered(model={"backend": "te"}, stages=(one,))`; a dict changes a part."""
        changed = {
            name: dataclasses.replace(getattr(self, name), **new) if isinstance(new, dict) else new
            for name, new in parts.items()
        }
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
