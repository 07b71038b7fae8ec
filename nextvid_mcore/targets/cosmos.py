"""Cosmos' causal video VAE as the target (Table 3, row "Cosmos VAE"), fitted to our grid.

Source: the tokenizer published as a diffusers folder (class AutoencoderKLCosmos, config.json and
safetensors, e.g. the `vae` folder of Cosmos-1.0-Tokenizer-CV8x8x8). It turns 1 + 8 k frames into 1 + k
latent frames of an 8 times smaller grid, where our tokens are 2 frames of 16 x 16 pixels. What the paper
did is not said; here

    time   every frame is shown r = 8 / 2 times in a row after one more copy of the first, so that each
           latent frame after the first covers exactly one tubelet and, the VAE being causal, nothing later.
           The first latent frame (of the copy) is dropped. The VAE so sees a clip r times slower than life,
           at r times the cost.
    space  the 2 x 2 latent positions under a token are stacked on channels: 4 * 16 = 64.

Values are normalised per channel with the folder's own statistics, averaged over its latent frames after
the first, or with --target.statistics. `decode` has to stand in for the dropped first latent frame and
takes a copy of the second; and it shows the last of the r copies of every frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig, require
from nextvid_mcore.targets.base import check_latents, check_video
from nextvid_mcore.targets.folder import FLAG, check_loaded, need_package, need_weights, read_json
from nextvid_mcore.targets.va_vae import load_statistics

CLASS = "AutoencoderKLCosmos"
EXAMPLE = f"the published diffusers folder of a Cosmos video VAE ({CLASS}: config.json and safetensors)"
SIZES = ("latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")


def read_config(folder: str | None) -> dict[str, Any]:
    """The folder's config.json, checked to be this class's."""
    config = read_json(folder, "cosmos", EXAMPLE)
    found = config.get("_class_name")
    require(found == CLASS, f"{FLAG} {folder} holds {found or 'no diffusers model'}; give {EXAMPLE}")
    for name in SIZES:
        require(
            type(config.get(name)) is int and config[name] >= 1,
            f"{FLAG} {folder}: {name} in config.json is {config.get(name)!r}, not a positive whole number",
        )
    return config


class Cosmos:
    """A frozen causal video autoencoder over slowed clips; implements `Target`."""

    def __init__(self, model: ModelConfig, autoencoder: nn.Module, mean: Tensor, std: Tensor) -> None:
        """`autoencoder` is where and in the dtype it is to run; mean, std: [latent], per channel."""
        self.model, config = model, autoencoder.config
        self.channels = self.channels_for(model, {name: config[name] for name in SIZES})
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.repeat = config["temporal_compression_ratio"] // model.tubelet_size  # r
        self.side = model.patch_size // config["spatial_compression_ratio"]  # latent positions of a token
        weight = next(autoencoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.mean, self.std = (
            part.detach().to(self.device, torch.float32).reshape(1, -1, 1, 1, 1) for part in (mean, std)
        )

    @staticmethod
    def channels_for(model: ModelConfig, config: dict[str, Any]) -> int:
        """C = latent * (patch / stride)^2; ConfigError unless tokens are whole numbers of latents."""
        latent, stride, frames = (config[name] for name in SIZES)
        require(
            model.patch_size % stride == 0,
            f"target cosmos makes one latent of {stride} x {stride} pixels, which does not divide the patch "
            f"size {model.patch_size}: set --model.patch-size to a multiple of {stride}",
        )
        require(
            frames % model.tubelet_size == 0,
            f"target cosmos makes one latent of {frames} frames, which the {model.tubelet_size} frames of a "
            f"token do not divide: set --model.tubelet-size to a divisor of {frames}",
        )
        return latent * (model.patch_size // stride) ** 2

    @classmethod
    def from_files(cls, config: RunConfig, device: torch.device | str, dtype: torch.dtype) -> Cosmos:
        """Load the folder that --target.checkpoint names."""
        folder = config.target.checkpoint
        settings = read_config(folder)
        mean, std = _statistics(config, settings)
        need_weights(folder)
        diffusers = need_package("diffusers", "cosmos")
        try:
            autoencoder, info = getattr(diffusers, CLASS).from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # else missing weights would stay without memory
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"{FLAG} {folder} cannot be loaded as {CLASS}: {first}") from error
        check_loaded(info, folder)
        return cls(config.model, autoencoder.to(device), mean, std)

    @torch.no_grad()
    def latents(
        self,
        video: Tensor,
        static: Tensor | None = None,
        indices: Sequence[int] | None = None,
        first: int = 0,
    ) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> normalised [B, t - first, n, C].

        `static` and `indices` make no difference. The frames left out are encoded all the same: the later
        ones see them.
        """
        check_video(video, self.model)
        video = video.to(self.device, self.dtype)
        slow = torch.cat((video[:, :, :1], video.repeat_interleave(self.repeat, dim=2)), dim=2)
        # Clip by clip: a slowed clip of 16 frames at 256 x 256 is 65 frames.
        values = torch.cat([self.autoencoder.encode(clip[None]).latent_dist.mode().float() for clip in slow])[
            :, :, 1 + first :
        ]  # [B, z, t, h * side, w * side]
        values = (values - self.mean) / self.std
        return rearrange(values, "b z t (h y) (w x) -> b t (h w) (y x z)", y=self.side, x=self.side)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised [B, t, n, C] -> [B, 3, T, H, W] float32, approximate (see the module's docstring)."""
        check_latents(latents, self.model, self.channels)
        values = rearrange(
            latents.to(self.device, torch.float32),
            "b t (h w) (y x z) -> b z t (h y) (w x)",
            h=self.model.grid,
            y=self.side,
            x=self.side,
        )
        values = (values * self.std + self.mean).to(self.dtype)
        values = torch.cat((values[:, :, :1], values), dim=2)
        slow = torch.cat([self.autoencoder.decode(clip[None]).sample.float() for clip in values])
        return slow[:, :, self.repeat :: self.repeat]


def _statistics(config: RunConfig, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every latent channel, [latent] each."""
    latent, folder = settings["latent_channels"], config.target.checkpoint
    if config.target.statistics is not None:
        return load_statistics(config.target.statistics, latent)
    parts = []
    for name in ("latents_mean", "latents_std"):
        values = settings.get(name)
        require(
            isinstance(values, list) and len(values) > 0 and len(values) % latent == 0,
            f"{FLAG} {folder}: config.json has no {name} for its {latent} channels; measure them and give "
            "--target.statistics FILE with `mean` and `std`",
        )
        frames = torch.tensor(values, dtype=torch.float32).reshape(latent, -1)  # [latent, latent frames]
        parts.append(frames[:, 1:] if frames.shape[1] > 1 else frames)
    mean, std = parts
    require(bool((std > 0).all()), f"{FLAG} {folder}: latents_std must be positive, got {std.min():.3g}")
    return mean.mean(1), std.square().mean(1).sqrt()
