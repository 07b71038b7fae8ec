"""Encoders of timm and transformers: image ViTs frame by frame, VideoMAE and V-JEPA 2 on whole clips.

Both packages are optional and imported here alone. Each model's own normalisation and frame size are
taken from its files; a model that doesn't say them is refused, never guessed.
"""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.evaluation.encoders import LAST, Wrapped, renormalise, resize
from nextvid_mcore.targets.folder import quiet

UNUSED = {"pooler", "head", "predictor", "mask_token"}  # parts that no patch's features pass through
FINAL_NORMS = ("layernorm", "post_layernorm", "norm")  # names of a last norm in transformers' models


def optional(package: str) -> ModuleType:
    """Import a package that the probe needs for this encoder alone."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{package}:... needs {package}, which cannot be imported ({error}); pip install {package}"
        ) from None


class Foreign(Wrapped):
    """A model with its own pixels' mean and deviation and, where it has one, a fixed frame size."""

    def __init__(
        self, name: str, module: nn.Module, size: int | None, depth: int, mean: Sequence, std: Sequence
    ) -> None:
        super().__init__(name, module, size, depth)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def prepared(self, video: Tensor) -> Tensor:
        video = renormalise(video, self.mean, self.std)
        return video if self.image_size is None else resize(video, self.image_size)


class PerFrame(Foreign):
    """An image model: each frame alone, the tokens of all frames in a row."""

    per_frame = True

    def __call__(self, video: Tensor, layers: Sequence[int] = LAST) -> list[Tensor]:
        indices = self.check_layers(layers)
        frames = self.prepared(video).transpose(1, 2)  # [B, T, 3, H, W]
        tokens = self.image_tokens(frames.flatten(0, 1), indices)
        return [x.unflatten(0, frames.shape[:2]).flatten(1, 2) for x in tokens]

    def image_tokens(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """[N, 3, H, W], layers from 0 -> a [N, s, D] each"""
        raise NotImplementedError


class TimmViT(PerFrame):
    def image_tokens(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        if layers == [self.depth - 1]:
            return [self.module.forward_features(images)]  # class and register tokens too
        kept = self.module.forward_intermediates(
            images,
            indices=sorted(set(layers)),
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        found = {
            index: torch.cat([prefix, patches], 1) if prefix is not None else patches
            for index, (patches, prefix) in zip(sorted(set(layers)), kept, strict=True)
        }
        return [found[index] for index in layers]


def timm_encoder(text: str) -> TimmViT:
    """NAME with timm's weights, or NAME=FILE with weights of a file."""
    name, equals, file = text.partition("=")
    require(not equals or Path(file).is_file(), f"timm:{text}: there is no file {file}")
    timm = optional("timm")
    try:
        model = timm.create_model(name, num_classes=0, pretrained=not equals)
        if equals:  # with or without its classifier, which is not used
            missing, surplus = timm.models.load_checkpoint(model, file, strict=False)
            head = str(model.pretrained_cfg.get("classifier") or "head")
            surplus = [key for key in surplus if not key.startswith(head + ".")]
            check_weights(f"timm:{text}", missing, surplus)
    except ConfigError:
        raise
    except (RuntimeError, OSError, ValueError, AssertionError, pickle.UnpicklingError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ConfigError(f"timm:{text} cannot be made: {reason}") from None
    return timm_vit(model, f"timm:{text}")


def check_weights(name: str, missing: Sequence[str], surplus: Sequence[str] = ()) -> None:
    """What isn't in a file would stay random, and the features with it."""
    for what, keys in (("lack", missing), ("have besides", surplus)):
        require(
            not keys,
            f"{name}: its weights {what} {len(keys)} tensors, e.g. "
            f"{', '.join(sorted(keys)[:3])}: the file is of another model",
        )


def timm_vit(model: nn.Module, name: str) -> TimmViT:
    """A timm model as an encoder."""
    require(
        hasattr(model, "forward_intermediates") and hasattr(model, "blocks"),
        f"{name} is not a ViT of timm (it has no blocks); choose one of timm.list_models('vit_*')",
    )
    config = model.pretrained_cfg
    size = None if getattr(model, "dynamic_img_size", False) else int(config["input_size"][-1])
    embed = getattr(model, "patch_embed", None)
    if size is not None and getattr(embed, "img_size", None):
        size = int(embed.img_size[0])  # a model made for another size than its weights'
    return TimmViT(name, model, size, len(model.blocks), config["mean"], config["std"])


# transformers ------------------------------------------------------------------------------------


def _layers_of(outputs: Any, layers: list[int], depth: int, norm: nn.Module | None) -> list[Tensor]:
    """Tokens after `layers`; the last one's are the model's own output."""
    hidden = outputs.hidden_states
    require(
        len(hidden) in (depth, depth + 1),
        f"the model gave {len(hidden)} hidden states for {depth} layers; ask for its last layer alone",
    )
    first = len(hidden) - depth  # where the embedding's output stands in front
    return [
        outputs.last_hidden_state
        if index == depth - 1
        else (norm(hidden[index + first]) if norm is not None else hidden[index + first])
        for index in layers
    ]


def _final_norm(model: nn.Module) -> nn.Module | None:
    """What a model's last_hidden_state went through and its inner layers' outputs did not."""
    if model.config.model_type.startswith("clip"):
        return None  # its post_layernorm is for the pooled token alone
    model = model.encoder if model.config.model_type == "vjepa2" else model
    for name in FINAL_NORMS:
        norm = getattr(model, name, None)
        if isinstance(norm, nn.Module):
            return norm
    return None


class TransformersViT(PerFrame):
    """An image model of transformers."""

    def image_tokens(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        outputs = self.module(pixel_values=images, output_hidden_states=layers != [self.depth - 1])
        if layers == [self.depth - 1]:
            return [outputs.last_hidden_state]
        return _layers_of(outputs, layers, self.depth, _final_norm(self.module))


class TransformersVideo(Foreign):
    """VideoMAE or V-JEPA 2 of transformers: clips [B, T, 3, H, W]."""

    def __init__(self, *args: Any, clip_frames: int | None, tubelet: int) -> None:
        super().__init__(*args)
        self.clip_frames = clip_frames  # VideoMAE's positions are for exactly so many frames
        self.frame_multiple = clip_frames or tubelet

    def __call__(self, video: Tensor, layers: Sequence[int] = LAST) -> list[Tensor]:
        indices = self.check_layers(layers)
        clips = self.prepared(video).transpose(1, 2)
        batch, frames = clips.shape[:2]
        require(
            frames % self.frame_multiple == 0,
            f"{self.name} takes {self.frame_multiple} frames at a time, not {frames}; set --frames",
        )
        if self.clip_frames:  # a longer clip goes through in pieces, their tokens in a row
            clips = clips.reshape(-1, self.clip_frames, *clips.shape[2:])
        several = indices != [self.depth - 1]
        if self.module.config.model_type == "vjepa2":
            extra: dict[str, Any] = {"pixel_values_videos": clips, "skip_predictor": True}
        else:
            extra = {"pixel_values": clips}
        outputs = self.module(**extra, output_hidden_states=several)
        if several:
            tokens = _layers_of(outputs, indices, self.depth, _final_norm(self.module))
        else:
            tokens = [outputs.last_hidden_state]
        return [x.reshape(batch, -1, x.shape[-1]) for x in tokens]


def read_processor(transformers: ModuleType, name: str) -> dict[str, Any]:
    """Of pictures, or as V-JEPA 2 is published: of videos alone."""
    try:
        return transformers.ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        try:
            path = transformers.utils.cached_file(name, "video_preprocessor_config.json")
        except OSError:
            path = None
        if path is None:
            raise
    return json.loads(Path(path).read_text())


def transformers_encoder(name: str) -> Foreign:
    """A model by its name or folder, with the normalisation that its image processor states."""
    transformers = optional("transformers")
    try:
        with quiet(transformers):
            model, info = transformers.AutoModel.from_pretrained(
                name,
                output_loading_info=True,
                trust_remote_code=False,  # else it asks on the terminal
            )
        processor = read_processor(transformers, name)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"transformers:{name} cannot be loaded: {str(error).splitlines()[0]}") from None
    used = "vision_model." if hasattr(model, "vision_model") else ""
    lacking = [key for key in info["missing_keys"] if key.startswith(used)]
    check_weights(f"transformers:{name}", [key for key in lacking if not UNUSED.intersection(key.split("."))])
    return transformers_model(model, processor, f"transformers:{name}")


def transformers_model(model: nn.Module, processor: dict[str, Any], name: str) -> Foreign:
    """A transformers model and the contents of its preprocessor_config.json as an encoder."""
    mean, std = processor.get("image_mean"), processor.get("image_std")
    require(
        mean is not None and std is not None,
        f"{name}: its preprocessor_config.json states no image_mean and image_std; add them",
    )
    model = getattr(model, "vision_model", model)  # of CLIP and SigLIP
    config = model.config
    depth = getattr(config, "num_hidden_layers", None)
    require(depth is not None, f"{name} ({config.model_type}) is no ViT: its config has no num_hidden_layers")
    if config.model_type == "videomae":
        size, frames = int(config.image_size), int(config.num_frames)
        return TransformersVideo(
            name, model, size, depth, mean, std, clip_frames=frames, tubelet=int(config.tubelet_size)
        )
    if config.model_type == "vjepa2":
        size = int(config.crop_size)
        return TransformersVideo(
            name, model, size, depth, mean, std, clip_frames=None, tubelet=int(config.tubelet_size)
        )
    require(hasattr(config, "image_size"), f"{name} ({config.model_type}): its config has no image_size")
    size = config.image_size
    return TransformersViT(name, model, int(size if isinstance(size, int) else size[0]), depth, mean, std)
