"""The four networks, their masks and the target of the flow (Section 3.4, Tables 7 and 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextvid_mcore.config.errors import require

TYPED = 0.05  # of a token: 73 of 196 has no decimal end, and is typed as 0.3724 or 0.372449


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of one transformer (Table 7)."""

    width: int
    depth: int
    heads: int
    mlp: int  # width of the MLP's hidden layer

    def check(self, role: str) -> None:
        for name in ("width", "depth", "heads", "mlp"):
            require(getattr(self, name) > 0, f"{role} {name} must be positive, got {getattr(self, name)}")
        require(
            self.width % self.heads == 0,
            f"{role} width {self.width} is not divisible by {self.heads} heads; change one of them",
        )
        require(
            (self.width // self.heads) % 2 == 0 and self.width // self.heads >= 6,
            f"{role} heads of width {self.width // self.heads} are too narrow or odd for 3D RoPE (even, 6 or "
            "more); change its width or heads",
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
    # torch, or Transformer Engine (needs CUDA); auto: Transformer Engine where it and a GPU are there
    backend: Literal["local", "te", "auto"] = "local"
    compile: bool = True  # on CUDA: fuse what stands between matrix products (models/fused.py)

    def __post_init__(self) -> None:
        for role in ("encoder", "predictor", "decoder"):
            getattr(self, role).check(role)
        for name in ("image_size", "patch_size", "tubelet_size", "rope_base", "norm_eps"):
            require(getattr(self, name) > 0, f"model {name} must be positive, got {getattr(self, name)}")
        require(self.init_std >= 0, f"model init_std must be 0 or more, got {self.init_std}")
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

    def shape(self, role: str) -> TransformerShape:
        """Of the network of `role`: student and reference are one encoder."""
        return getattr(self, {"student": "encoder", "reference": "encoder"}.get(role, role))

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
            exact, count = share * tokens_per_frame, round(share * tokens_per_frame)
            near = sorted({math.floor(exact), math.ceil(exact)} & set(range(1, tokens_per_frame)))
            shares = " or ".join(f"{x / tokens_per_frame:.6g} ({x})" for x in near)
            require(
                abs(exact - count) <= TYPED and 1 <= count < tokens_per_frame,
                f"mask keep {share} of {tokens_per_frame} tokens is {exact:g}: not a whole number of tokens; "
                f"keep {shares or 'a patch size that leaves more than one'}",
            )
            out.append(count)
        return tuple(out)


@dataclass(frozen=True)
class TargetConfig:
    """What the flow decoder generates (Section 3.4, Table 3)."""

    kind: Literal["pixels", "va_vae", "siglip2", "cosmos"] = "va_vae"
    checkpoint: str | None = None  # va_vae: its checkpoint; siglip2, cosmos: the published folder
    statistics: str | None = None  # va_vae: its latents_stats.pt; siglip2, cosmos: instead of their own
    sample_posterior: bool = False  # False: the posterior's mode
    compile: bool = True  # va_vae, in bf16 on CUDA: Triton between its encoder's convolutions
    chunk: int = 32  # va_vae, siglip2: frames that go through its network at a time; fewer take less memory
    pixel_scale: float = 1.0  # pixels: times this, so that data as flat as moving digits has unit variance

    def __post_init__(self) -> None:
        require(self.chunk > 0, f"target chunk must be 1 frame or more, got {self.chunk}")
        require(self.pixel_scale > 0, f"target pixel scale must be positive, got {self.pixel_scale}")
        require(
            self.kind == "pixels" or self.pixel_scale == 1.0,
            f"target pixel scale {self.pixel_scale} says nothing with target {self.kind}; leave it at 1",
        )
        for name in ("checkpoint", "statistics"):
            require(
                self.kind != "pixels" or getattr(self, name) is None,
                f"--target.{name} {getattr(self, name)}: target pixels reads no file; leave it out, or give "
                "--target.kind va_vae, siglip2 or cosmos, whichever the file is of",
            )
        require(
            self.kind == "va_vae" or not self.sample_posterior,
            f"--target.sample-posterior says nothing with target {self.kind}: only va_vae's is sampled",
        )
