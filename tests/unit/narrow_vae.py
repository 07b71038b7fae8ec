"""An autoencoder of VA-VAE's structure, narrow enough for tests, and clips for targets."""

from __future__ import annotations

import torch

from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape

NARROW = AutoencoderShape(width=32, latent=4)


def clip(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Values in [-1, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_narrow() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(NARROW)
