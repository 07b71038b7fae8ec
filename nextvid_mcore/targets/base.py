"""What the flow decoder generates: one protocol, and how a run's target is chosen (Section 3.4, Table 3).

A target turns a clip into one vector of C channels per token, on the encoder's own (t, h, w) grid, so
that a target token and a predicted token stand for the same cube of the video. Targets are frozen and
hold no trained parameters: they are plain objects, not modules, so that no optimizer, EMA or checkpoint
of the model that owns one can pick their weights up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig, require
from nextvid_mcore.targets.autoencoder import AutoencoderShape


@runtime_checkable
class Target(Protocol):
    """A space to generate in. `isinstance(x, Target)` checks that the three members are there."""

    channels: int
    """C, channels of a target token."""

    def latents(
        self,
        video: Tensor,
        static: Tensor | None = None,
        indices: Sequence[int] | None = None,
        first: int = 0,
    ) -> Tensor:
        """video [B, 3, T, H, W] float in [-1, 1] -> [B, t - first, n, C] float32, without gradient.

        `static`: bool [B] on the CPU, True for clips whose T frames are identical (images): a cue that
        may save work and never changes the result. `indices`: the clips' global sample indices; only
        targets that draw random numbers need them. `first`: token frames before it are left out (the
        first is never predicted); the others are what they are without it.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, t, n, C] -> video [B, 3, T, H, W] float32, about in [-1, 1]: for pictures."""
        ...


def target_channels(config: RunConfig) -> int:
    """C of the run's target, without building it; raises ConfigError if its grid cannot fit the tokens."""
    from nextvid_mcore.targets import cosmos, pixels, siglip2, va_vae  # they need this module's checks

    target = config.target
    if target.kind == "siglip2":
        return siglip2.Siglip2.channels_for(config.model, siglip2.read_config(target.checkpoint))
    if target.kind == "cosmos":
        return cosmos.Cosmos.channels_for(config.model, cosmos.read_config(target.checkpoint))
    if target.kind == "va_vae":
        try:
            return va_vae.VaVae.channels_for(config.model, vae_shape(target.checkpoint))
        except ConfigError as error:
            if target.checkpoint is None or Path(target.checkpoint).is_file():
                raise
            raise ConfigError(
                f"--target.checkpoint {target.checkpoint}: no such file, and VA-VAE's own would not fit: "
                f"{error}"
            ) from None
    return pixels.Pixels.channels_for(config.model)


def vae_shape(checkpoint: str | None) -> AutoencoderShape:
    """Sizes of target va_vae's network; without its file (a plan, a conversion elsewhere) VA-VAE's own."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return AutoencoderShape()
    return _shape_of(checkpoint, Path(checkpoint).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _shape_of(checkpoint: str, written: int) -> AutoencoderShape:
    """Read once: a plan asks for it a hundred times."""
    from nextvid_mcore.targets import va_vae

    return va_vae.shape_of(checkpoint)


def width_note(config: RunConfig) -> str | None:
    """What a decoder narrower than the target costs, or None: its output moves in `width` directions, and the
    velocity's noise needs all C."""
    if not config.model.generate:
        return None
    width, channels = config.model.decoder.width, target_channels(config)
    if width >= channels:
        return None
    return (
        f"note: the decoder's width of {width} is below the target's {channels} channels: their noise stays "
        f"in what is generated, and {1 - width / channels:.2f} of the flow loss; --model.decoder.width and "
        f"--model.predictor.width {channels} or more take it away"
    )


def build_target(config: RunConfig, device: torch.device | str, dtype: torch.dtype) -> Target:
    """The run's target on `device`. `dtype` is what a network inside it computes in.

    Raises ConfigError, naming the flag, when a file it needs is missing or wrong.
    """
    from nextvid_mcore.targets import cosmos, pixels, siglip2, va_vae

    target_channels(config)  # the cheap checks come before any weights are read
    if config.target.kind == "pixels":
        return pixels.Pixels(config.model, config.target.pixel_scale)
    kinds = {"va_vae": va_vae.VaVae, "siglip2": siglip2.Siglip2, "cosmos": cosmos.Cosmos}
    return kinds[config.target.kind].from_files(config, device, dtype)


def check_video(video: Tensor, model: ModelConfig) -> None:
    """Raise ConfigError unless video is a float [B, 3, T, H, W] clip of the model's size."""
    require(
        video.ndim == 5 and video.shape[1] == 3,
        f"a target reads video as [B, 3, T, H, W], got {tuple(video.shape)}",
    )
    require(
        video.is_floating_point(),
        f"a target reads floats in [-1, 1], got {video.dtype}; normalise the clip first",
    )
    size = model.image_size
    require(
        video.shape[-2:] == (size, size),
        f"the target's grid is made for {size} x {size} pixels, got {video.shape[-2]} x {video.shape[-1]}",
    )
    require(
        video.shape[2] % model.tubelet_size == 0,
        f"{video.shape[2]} frames are not a multiple of the tubelet size {model.tubelet_size}",
    )


def check_latents(latents: Tensor, model: ModelConfig, channels: int) -> None:
    """Raise ConfigError unless latents are [B, t, n, C] of the model's grid."""
    require(
        latents.ndim == 4 and latents.shape[2:] == (model.tokens_per_frame, channels),
        f"latents must be [B, t, {model.tokens_per_frame}, {channels}], got {tuple(latents.shape)}",
    )
