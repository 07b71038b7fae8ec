"""A whole run, and how its parts fit together."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from nextvid_mcore.config.data import DataConfig
from nextvid_mcore.config.errors import require
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
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, "a run needs at least one stage")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stage names must differ, got {names}")
        for stage in self.stages:
            self.model.token_frames(stage.frames)
        if self.mask.static:
            self.mask.counts(self.model.tokens_per_frame)
        if self.profile.span is not None:
            steps = sum(stage.steps for stage in self.stages)
            steps = min(steps, self.train.steps or steps)
            require(
                self.profile.span[1] <= steps,
                f"profile steps {self.profile.steps} go past the run's last step, {steps}",
            )

    def batch(self, stage: StageConfig) -> int:
        """Clips per step of a stage."""
        return self.train.global_batch or stage.batch

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
