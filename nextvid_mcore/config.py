"""Everything a run can be told: frozen dataclasses, one per concern, and what makes them legal.

`RunConfig` is the whole; a recipe is a function that returns one; `nextvid_mcore.cli` turns it into
command-line flags (`--train.global-batch 8`). Checks that need no other part of the configuration
stand in `__post_init__`; `RunConfig.check(world_size)` looks at how the parts fit together. Every
failure is a `ConfigError` that names the numbers and the way out.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

MOVING_DIGITS = "moving-digits"  # a manifest that is made and not read (data/digits_source.py)


class ConfigError(ValueError):
    """A setting that cannot work. The message is written for the person who typed it."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of one transformer (Table 7)."""

    width: int
    depth: int
    heads: int
    mlp: int  # width of the MLP's hidden layer

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            self.width % self.heads == 0,
            f"width {self.width} is not divisible by {self.heads} heads; change one of them",
        )
        require(
            (self.width // self.heads) % 2 == 0 and self.width // self.heads >= 6,
            f"heads of width {self.width // self.heads} are too narrow or odd for 3D RoPE (even, 6 or more)",
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class ModelConfig:
    """The four networks (Section 3.4, Table 7). The reference encoder has the encoder's shape."""

    encoder: TransformerShape
    predictor: TransformerShape = TransformerShape(width=384, depth=12, heads=12, mlp=1536)
    decoder: TransformerShape = TransformerShape(width=384, depth=12, heads=12, mlp=1536)
    image_size: int = 256  # pixels, square
    patch_size: int = 16  # pixels, square
    tubelet_size: int = 2  # video frames per token frame
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    align_target: Literal["layernorm", "none"] = "layernorm"  # of the reference features (Eq. 5)
    # The ablations' switches (Section 4.4); recipes/ablations.py has a row of each table.
    generate: bool = True  # Table 2, "Gen.": the decoder and the flow loss
    align: bool = True  # Table 2, "Align.": the alignment loss and the reference's forward pass
    context: Literal["isolated", "joint"] = "isolated"  # Table 2, "C-Iso.": models/predictor.py
    condition: Literal["concat", "cross", "cross_self"] = "concat"  # Table 5: models/decoder.py
    backend: Literal["local", "te"] = "local"  # torch, or Transformer Engine (needs CUDA)

    def __post_init__(self) -> None:
        require(self.patch_size > 0 and self.tubelet_size > 0, "patch and tubelet sizes must be positive")
        require(
            self.image_size % self.patch_size == 0,
            f"image size {self.image_size} is not divisible by the patch size {self.patch_size}",
        )
        require(
            self.predictor.width == self.decoder.width,
            f"the decoder reads the prediction at its own width: predictor {self.predictor.width} "
            f"and decoder {self.decoder.width} must be equal",
        )
        require(
            self.generate or self.align,
            "generate and align are both off, so there is no loss to train with; switch one of them on",
        )
        require(
            self.generate or self.condition == "concat",
            f"condition {self.condition} is a kind of decoder, but generate is off and there is none; "
            "leave condition at concat",
        )

    @property
    def grid(self) -> int:
        """Token rows (and columns) of a frame: h = w."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """n."""
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        """Values of one 3D patch: 3 * tubelet * patch * patch."""
        return 3 * self.tubelet_size * self.patch_size**2

    def token_frames(self, frames: int) -> int:
        """t for a clip of `frames` video frames."""
        require(
            frames % self.tubelet_size == 0 and frames >= 2 * self.tubelet_size,
            f"{frames} frames: must be a multiple of the tubelet size {self.tubelet_size} and at least "
            f"{2 * self.tubelet_size}, so that there is a next frame to predict",
        )
        return frames // self.tubelet_size


@dataclass(frozen=True)
class MaskConfig:
    """Block masks that hide the same positions in every frame (Section 3.4, Table 8)."""

    mode: Literal["fixed", "packed", "truncate", "none"] = "fixed"  # none: one mask that hides nothing
    blocks: tuple[int, ...] = (8, 2)  # blocks per mask; one entry is one mask (M entries)
    scale: tuple[float, ...] = (0.15, 0.7)  # share of the frame that one block covers, per mask
    keep: tuple[float, ...] = (0.375, 0.1875)  # share kept by each mask; `fixed` only
    aspect: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self) -> None:
        require(
            len(self.blocks) == len(self.scale) == len(self.keep) > 0,
            f"blocks, scale and keep describe the same masks: got {len(self.blocks)}, "
            f"{len(self.scale)} and {len(self.keep)} entries",
        )
        require(all(b > 0 for b in self.blocks), f"mask blocks must be positive, got {self.blocks}")
        for name in ("scale", "keep"):
            values = getattr(self, name)
            require(all(0 < x < 1 for x in values), f"mask {name} must lie in (0, 1), got {values}")
        low, high = self.aspect
        require(0 < low <= high, f"mask aspect must be a rising positive range, got {self.aspect}")

    @property
    def masks(self) -> int:
        """M."""
        return 1 if self.mode == "none" else len(self.blocks)

    @property
    def static(self) -> bool:
        """Every frame of every clip keeps the same number of tokens: `counts`."""
        return self.mode in ("fixed", "none")

    def counts(self, tokens_per_frame: int) -> tuple[int, ...]:
        """Visible tokens v of a frame under each mask, in the static modes."""
        if self.mode == "none":
            return (tokens_per_frame,)
        out = []
        for share in self.keep:
            count = share * tokens_per_frame
            require(
                count == int(count) and count >= 1,
                f"mask keep {share} of {tokens_per_frame} tokens is {count}: not a whole number of "
                f"tokens; choose a share k / {tokens_per_frame}",
            )
            out.append(int(count))
        return tuple(out)


@dataclass(frozen=True)
class TargetConfig:
    """What the flow decoder generates (Section 3.4, Table 3)."""

    kind: Literal["pixels", "va_vae", "siglip2", "cosmos"] = "va_vae"
    checkpoint: str | None = None  # va_vae: its checkpoint; siglip2, cosmos: the published folder
    statistics: str | None = None  # va_vae: its latents_stats.pt; siglip2, cosmos: instead of their own
    sample_posterior: bool = False  # False: the posterior's mode
    pixel_scale: float = 1.0  # pixels: times this, so that data as flat as moving digits has unit variance

    def __post_init__(self) -> None:
        require(self.pixel_scale > 0, f"target pixel scale must be positive, got {self.pixel_scale}")
        require(
            self.kind == "pixels" or self.pixel_scale == 1.0,
            f"target pixel scale {self.pixel_scale} says nothing with target {self.kind}; leave it at 1",
        )


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
        require(0 <= self.flip <= 1, f"flip is a probability, got {self.flip}")
        require(0 <= self.max_bad_share <= 1, f"max bad share lies in [0, 1], got {self.max_bad_share}")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"crop scale must be a rising range in (0, 1], got {self.crop_scale}")


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

    def __post_init__(self) -> None:
        for name in ("steps", "frames", "batch", "tau_samples"):
            value = getattr(self, name)
            require(value > 0, f"stage {self.name}: {name} must be positive, got {value}")
        require(self.lr_start >= 0 and self.lr_end >= 0, f"stage {self.name}: negative learning rate")


@dataclass(frozen=True)
class LossConfig:
    """Eq. 9 with Table 8's weights."""

    flow: float = 0.5
    align: float = 1.0
    tau: Literal["frame", "clip"] = "frame"  # tau is drawn per predicted frame, or once per clip

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
    sequence: bool = False  # sequence parallelism inside the tensor groups
    recompute: Literal["none", "core_attn", "full"] = "none"
    timeout: float = 600.0  # seconds without progress after which the run ends (parallel/watchdog.py)

    def __post_init__(self) -> None:
        require(self.timeout > 0, f"parallel timeout must be positive, got {self.timeout}")


@dataclass(frozen=True)
class TrainConfig:
    """The run itself."""

    steps: int | None = None  # stop after this many steps; None: the whole schedule
    start_stage: str | None = None  # begin at this stage's first step (with --init-from)
    global_batch: int | None = None  # overrides every stage's batch
    micro_batch: int = 1  # clips of one encoder replica in one forward pass
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    init_from: str | None = None  # weights only, from a run or a checkpoint
    init_noise: float = 0.0  # std of seeded noise in tensors that start at zero (tests)
    log_every: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train {name} must be positive, got {value}")
        require(self.micro_batch > 0, f"micro batch must be positive, got {self.micro_batch}")
        require(self.log_every > 0, f"log every must be positive, got {self.log_every}")
        require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")
        require(self.init_noise >= 0, f"init noise must be 0 or more, got {self.init_noise}")


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

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval every must be 0 (never) or more, got {self.every}")
        require(self.samples > 0 and self.batch > 0 and self.tau_bins > 0, "eval sizes must be positive")


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
