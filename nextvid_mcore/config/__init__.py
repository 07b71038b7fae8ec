"""Everything a run can be told: frozen dataclasses, one per concern, and what makes them legal.

`RunConfig` is the whole; a recipe is a function that returns one; `nextvid_mcore.cli` turns it into
command-line flags (`--train.global-batch 8`). Checks that need no other part of the configuration
stand in `__post_init__`; `RunConfig` looks at how the parts fit together. Every failure is a
`ConfigError` that names the numbers and the way out. The modules are cut by what they configure; import
from here.
"""

from nextvid_mcore.config.data import MOVING_DIGITS, DataConfig, SetConfig, is_made
from nextvid_mcore.config.errors import ConfigError, require
from nextvid_mcore.config.fp8 import Fp8Config
from nextvid_mcore.config.model import MaskConfig, ModelConfig, TargetConfig, TransformerShape
from nextvid_mcore.config.parallel import ParallelConfig, RoleParallel
from nextvid_mcore.config.records import CheckpointConfig, EvalConfig, ProfileConfig, WandbConfig
from nextvid_mcore.config.run import RunConfig
from nextvid_mcore.config.training import LossConfig, OptimConfig, StageConfig, TrainConfig

__all__ = [
    "MOVING_DIGITS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "Fp8Config",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RoleParallel",
    "RunConfig",
    "SetConfig",
    "StageConfig",
    "TargetConfig",
    "TrainConfig",
    "TransformerShape",
    "WandbConfig",
    "is_made",
    "require",
]
