"""Flow matching (Eq. 6-8): the path from noise to data, the draws of tau and noise, and ODE solvers.

gamma(x0, x1; tau) = (1 - tau) x0 + tau x1 runs from noise x0 at tau = 0 to data x1 at tau = 1; the
decoder regresses its velocity x1 - x0. Draws are made sample by sample from (seed, global index), so
a micro-batch sees the same numbers however a batch is cut up. On CUDA the noise comes from CUDA's
own generator: same distribution and purity, other numbers than on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nextvid_mcore import rng
from nextvid_mcore.config import require
from nextvid_mcore.transfer import to_device

TAU_SCALE = 1000.0  # Table 8: timesteps
MAX_PERIOD = 10000.0
TAU_WIDTH = 256  # of the sinusoidal embedding, as in DiT

Velocity = Callable[[Tensor, float], Tensor]  # (x, tau) -> dx / dtau, shaped like x


def interpolate(noise: Tensor, data: Tensor, tau: Tensor) -> Tensor:
    """gamma(noise, data; tau): [B, M, p, K, n, C], broadcast; tau has the leading axes, [B, M, p, K]."""
    dims = max(noise.dim(), data.dim())
    tau = tau.reshape(tau.shape + (1,) * (dims - tau.dim()))
    return (1 - tau) * noise + tau * data


def velocity(noise: Tensor, data: Tensor) -> Tensor:
    """d gamma / d tau = data - noise, the same at every tau (Eq. 6)."""
    return data - noise


def draw(
    seed: int,
    indices: Sequence[int],
    masks: int,
    frames: int,
    tau_samples: int,
    n: int,
    channels: int,
    per: Literal["frame", "clip"] = "frame",
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """tau [B, M, p, K] and noise [B, M, p, K, n, C] of the clips with global sample indices `indices`."""
    tau = draw_tau(seed, indices, masks, frames, tau_samples, per, device)
    return tau, draw_noise(seed, indices, (masks, frames, tau_samples, n, channels), device)


def draw_tau(
    seed: int,
    indices: Sequence[int],
    masks: int,
    frames: int,
    tau_samples: int,
    per: Literal["frame", "clip"] = "frame",
    device: str | torch.device = "cpu",
) -> Tensor:
    """tau uniform on (0, 1), ends excluded: float32 [B, M, p, K]; per "clip" all frames of a row agree.

    The same numbers on every device.
    """
    require(per in ("frame", "clip"), f"tau is drawn per 'frame' or per 'clip', not per {per!r}")
    shape = (masks, frames if per == "frame" else 1, tau_samples)
    # Odd multiples of 2 ** -24 are exact in float32: neither end can be rounded to.
    drawn = rng.numpy_rngs(seed, "tau", ((int(index),) for index in indices))
    bins = np.stack([generator.integers(0, 1 << 23, shape) for generator in drawn])
    tau = torch.from_numpy((2 * bins + 1).astype(np.float32) * np.float32(2.0**-24))
    return to_device(tau.expand(-1, -1, frames, -1).contiguous(), device)


def draw_noise(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], device: str | torch.device = "cpu"
) -> Tensor:
    """Standard normal float32 [B, *shape]."""
    noise = torch.empty(len(indices), *shape, device=device)
    if noise.device.type == "cuda":
        generator = torch.Generator(device=noise.device)
        for row, index in zip(noise, indices, strict=True):
            row.normal_(generator=generator.manual_seed(rng.key(seed, "noise", int(index))))
    else:  # not torch's CPU generator: it keeps 32 bits of a seed, so samples of a long run would collide
        drawn = rng.numpy_rngs(seed, "noise", ((int(index),) for index in indices))
        for row, generator in zip(noise, drawn, strict=True):
            generator.standard_normal(dtype=np.float32, out=row.numpy())
    return noise


def timestep_embedding(tau: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 tau as in DiT: [...] -> float32 [..., dim], cosines then sines."""
    require(dim % 2 == 0, f"a timestep embedding has pairs of dimensions: {dim} is odd, use an even width")
    half = dim // 2
    rank = torch.arange(half, dtype=torch.float32, device=tau.device)
    phase = (TAU_SCALE * tau.float())[..., None] * torch.exp(-math.log(MAX_PERIOD) / half * rank)
    return torch.cat((phase.cos(), phase.sin()), dim=-1)


def euler(velocity_fn: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Integrate from noise (tau = 0) to data (tau = 1) with `steps` evaluations; first order."""
    require(steps >= 1, f"a solver needs at least 1 step, got {steps}")
    x = noise
    for step in range(steps):
        x = x + velocity_fn(x, step / steps) / steps
    return x


def midpoint(velocity_fn: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Integrate from noise (tau = 0) to data (tau = 1) with 2 * `steps` evaluations; second order."""
    require(steps >= 1, f"a solver needs at least 1 step, got {steps}")
    x = noise
    for step in range(steps):
        middle = x + velocity_fn(x, step / steps) / (2 * steps)
        x = x + velocity_fn(middle, (step + 0.5) / steps) / steps
    return x
