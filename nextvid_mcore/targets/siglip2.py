"""SigLIP2 features as the target (Table 3, row "Siglip2"): what a semantic image encoder says of each patch.

Source: the folders that transformers loads (config.json and safetensors). Two kinds are published: FixRes
(model type `siglip`, e.g. siglip2-base-patch16-256) and NaFlex (model type `siglip2`, which reads patches);
both are read, with or without their text tower. Every frame is encoded by itself at the run's own size;
token (t, y, x) holds the patch features at (y, x) of the tubelet's frames, stacked on channels as with
VA-VAE. Each frame's features are layer-normed without affine, which brings them near the flow's unit
noise, or normalised per channel with --target.statistics.

Features can't be turned back into pixels: `decode` shows false colours, the three principal directions of
the features of a fixed set of synthetic pictures, so that equal colours mean like features in any picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig, require
from nextvid_mcore.rng import torch_generator
from nextvid_mcore.targets.base import check_latents, check_video
from nextvid_mcore.targets.folder import FLAG, check_loaded, need_package, need_weights, quiet, read_json
from nextvid_mcore.targets.va_vae import load_statistics

EXAMPLE = "a published SigLIP2 folder for transformers (config.json and safetensors)"
CLASSES = {"siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}
SIZES = {  # where a published config leaves the class's default out
    "hidden_size": 768,
    "patch_size": 16,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
}
TEXT = ("text_model.", "logit_scale", "logit_bias")  # of the whole model, not needed here
PICTURES = 16  # synthetic ones that fix the false colours


def read_config(folder: str | None) -> dict[str, Any]:
    """Of the folder's config.json: `kind` (siglip or siglip2) and `SIZES`."""
    config = read_json(folder, "siglip2", EXAMPLE)
    kind = str(config.get("model_type", "")).removesuffix("_vision_model")
    require(
        kind in CLASSES,
        f"{FLAG} {folder}: model type {config.get('model_type')!r} is none of {', '.join(CLASSES)}; give "
        f"{EXAMPLE}",
    )
    vision = config.get("vision_config", config)
    sizes = {name: vision.get(name, default) for name, default in SIZES.items()}
    for name, value in sizes.items():
        require(type(value) is int and value > 0, f"{FLAG} {folder}: {name} in config.json is {value!r}")
    return {"kind": kind, **sizes}


class Siglip2:
    """A frozen image encoder's patch features; implements `Target`."""

    false_colour = True  # `decode` gives no pixels that could be read again

    def __init__(
        self,
        model: ModelConfig,
        network: nn.Module,
        statistics: tuple[Tensor, Tensor] | None = None,
        *,
        chunk: int = 32,
    ) -> None:
        """`network` (a vision tower) is where and in the dtype it is to run; `chunk` frames at a time."""
        config = network.config
        self.kind = config.model_type.removesuffix("_vision_model")
        self.model, self.chunk, self.width = model, chunk, config.hidden_size
        sizes = {"hidden_size": config.hidden_size, "patch_size": config.patch_size}
        self.channels = self.channels_for(model, sizes)
        self.network = network.eval().requires_grad_(False)
        weight = next(network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.statistics = (
            None if statistics is None else tuple(x.to(self.device, torch.float32) for x in statistics)
        )
        self._palette: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def channels_for(model: ModelConfig, config: dict[str, Any]) -> int:
        """C = tubelet * hidden size; ConfigError unless one of its patches is one token."""
        require(
            model.patch_size == config["patch_size"],
            f"target siglip2 has patches of {config['patch_size']} pixels, but the model's are "
            f"{model.patch_size}: set --model.patch-size {config['patch_size']} or take another SigLIP2",
        )
        return model.tubelet_size * config["hidden_size"]

    @classmethod
    def from_files(cls, config: RunConfig, device: torch.device | str, dtype: torch.dtype) -> Siglip2:
        """Load the folder that --target.checkpoint names."""
        folder, statistics = config.target.checkpoint, config.target.statistics
        sizes = read_config(folder)
        numbers = None if statistics is None else load_statistics(statistics, sizes["hidden_size"])
        need_weights(folder)
        transformers = need_package("transformers", "siglip2")
        try:
            with quiet(transformers):
                network, info = getattr(transformers, CLASSES[sizes["kind"]]).from_pretrained(
                    folder,
                    dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"{FLAG} {folder} cannot be loaded as a SigLIP2: {first}") from error
        check_loaded(info, folder, spare=TEXT)
        return cls(config.model, network.to(device), numbers, chunk=config.target.chunk)

    @torch.no_grad()
    def latents(
        self,
        video: Tensor,
        static: Tensor | None = None,
        indices: Sequence[int] | None = None,
        first: int = 0,
    ) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> [B, t - first, n, C]; static clips' frames are encoded once."""
        check_video(video, self.model)
        B, k = len(video), self.model.tubelet_size
        video = video[:, :, first * k :]
        still = static is not None and bool(static.all())
        frames = rearrange(video[:, :, :1] if still else video, "b c t h w -> (b t) c h w")
        values = torch.cat([self._encode(part) for part in frames.split(self.chunk)])  # [B * T, n, hidden]
        if still:
            values = values.repeat_interleave(video.shape[2], 0)
        return rearrange(values, "(b t k) n d -> b t n (k d)", b=B, k=k)

    def _encode(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> normalised features [N, n, hidden] float32."""
        frames = frames.to(self.device, self.dtype)
        if self.kind == "siglip":
            out = self.network(pixel_values=frames, interpolate_pos_encoding=True)
        else:  # patches flattened (dy, dx, c)
            p, grid = self.model.patch_size, self.model.grid
            patches = rearrange(frames, "n c (h y) (w x) -> n (h w) (y x c)", y=p, x=p)
            out = self.network(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32, device=self.device),
                spatial_shapes=torch.tensor([[grid, grid]] * len(frames), device=self.device),
            )
        features = out.last_hidden_state.float()
        if self.statistics is None:
            return F.layer_norm(features, (self.width,))
        mean, std = self.statistics
        return (features - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, t, n, C] -> false colours [B, 3, T, H, W] float32."""
        check_latents(latents, self.model, self.channels)
        if self._palette is None:
            self._palette = self._make_palette()
        mean, directions, spread = self._palette
        features = rearrange(
            latents.to(self.device, torch.float32),
            "b t (h w) (k d) -> b (t k) h w d",
            h=self.model.grid,
            k=self.model.tubelet_size,
        )
        colours = ((features - mean) @ directions / (2.5 * spread)).clamp(-1, 1)
        p = self.model.patch_size
        return colours.permute(0, 4, 1, 2, 3).repeat_interleave(p, 3).repeat_interleave(p, 4)

    def _make_palette(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [d], three directions [d, 3] and their spread [3]: a function of the weights alone."""
        generator = torch_generator(0, "eval")
        size = self.model.image_size
        shapes = [
            F.interpolate(torch.rand(PICTURES, 3, s, s, generator=generator) * 2 - 1, (size, size), mode=mode)
            for s, mode in ((4, "bilinear"), (max(8, size // 4), "nearest"))
        ]
        features = self._encode(torch.cat([shapes[0][: PICTURES // 2], sum(shapes)[PICTURES // 2 :] / 2]))
        features = features.flatten(0, 1)  # [tokens, d]
        mean = features.mean(0)
        _, values, directions = torch.linalg.svd(features - mean, full_matrices=False)
        return mean, directions[:3].T, values[:3].clamp_min(1e-6) / len(features) ** 0.5
