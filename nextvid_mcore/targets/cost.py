"""FLOPs of a target's network on one training clip, two a multiply-add, from its sizes alone.

SigLIP2 is a plain ViT, so by formula. Autoencoders are counted: the network runs on the meta device, where
tensors have shapes and no numbers, under torch's own counter of convolutions, products and attention.
"""

from __future__ import annotations

import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.targets import cosmos, siglip2
from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape
from nextvid_mcore.targets.base import vae_shape
from nextvid_mcore.targets.folder import need_package


def va_vae_flops(checkpoint: str | None, model: ModelConfig, frames: int) -> float:
    """Of the predicted frames alone: frame 0's latents are never asked for."""
    return (frames - model.tubelet_size) * _image_flops(vae_shape(checkpoint), model.image_size)


@functools.lru_cache(maxsize=64)
def _image_flops(shape: AutoencoderShape, size: int) -> float:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoencoderKL(shape).encode(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops())


def siglip2_flops(folder: str, model: ModelConfig, frames: int) -> float:
    """Every predicted frame by itself: patches, layers and the pooling head, computed though not used."""
    sizes = siglip2.read_config(folder)
    siglip2.Siglip2.channels_for(model, sizes)
    D, mlp, n = sizes["hidden_size"], sizes["intermediate_size"], model.tokens_per_frame
    layer = 2 * (4 * D * D + 2 * D * mlp) * n + 4 * D * n * n
    head = 2 * (2 * D * D * n + 2 * D * D + 2 * D * mlp) + 4 * D * n  # one query
    frames -= model.tubelet_size
    return float(frames * (2 * 3 * model.patch_size**2 * D * n + sizes["num_hidden_layers"] * layer + head))


@functools.lru_cache(maxsize=64)
def cosmos_flops(folder: str, model: ModelConfig, frames: int) -> float:
    """Of the slowed clip.

    Raises:
        ConfigError: no config.json there, or no diffusers, which knows the network.
    """
    settings = cosmos.read_config(folder)
    cosmos.Cosmos.channels_for(model, settings)
    network = getattr(need_package("diffusers", "cosmos"), cosmos.CLASS)
    with torch.device("meta"):
        one = torch.ones(settings["latent_channels"])
        autoencoder = network.from_config(settings).to("meta")  # some of its buffers aren't there yet
        target = cosmos.Cosmos(model, autoencoder, one, one)
        video = torch.empty(1, 3, frames, model.image_size, model.image_size)
        with FlopCounterMode(display=False) as counter:
            target.latents(video, first=1)
    return float(counter.get_total_flops())
