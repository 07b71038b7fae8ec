"""VA-VAE's encoder in pieces of Triton, which the interpreter runs, against the eager one."""

from __future__ import annotations

import pytest
import torch
from unit.narrow_vae import clip

from nextvid_mcore.config import ConfigError
from nextvid_mcore.targets import triton_vae
from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape
from nextvid_mcore.targets.fused_vae import FusedEncoder
from nextvid_mcore.targets.triton_vae import Tuning, normalise, waiting


@torch.no_grad()
def autoencoder(multipliers: tuple[int, ...]) -> AutoencoderKL:
    torch.manual_seed(0)
    made = AutoencoderKL(AutoencoderShape(width=32, multipliers=multipliers, latent=4))
    for weight in made.parameters():
        if weight.ndim == 1:
            weight.add_(0.3 * torch.randn_like(weight))
    return made.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("multipliers", "shape"), [((1, 2), (2, 3, 24, 16)), ((2, 2), (1, 3, 16, 16))])
def test_the_fused_encoder_equals_the_eager_one(multipliers, shape):
    """Images of several slices, the last not full; a first block as wide as the first convolution, or not."""
    made = autoencoder(multipliers)
    frames = clip(shape)
    wanted = made.encode(frames)
    found = FusedEncoder(made, Tuning(tile=32 * 64, slice=32 * 128))(frames)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "slice"), [(64, 4096), (128, 1 << 20)]
)  # several slices; several shares
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_its_norm_is_group_norm(offset, channels, slice):
    """Also where the mean is large against the spread: more than this bf16 can't hold."""
    generator = torch.Generator().manual_seed(0)
    shift, spread, late = (torch.randn(channels, generator=generator) for _ in range(3))
    weight, bias, spread = 1 + 0.2 * late.flip(0), 0.2 * shift, 0.5 + spread.abs()
    x = torch.randn(3, 8, 16, channels, generator=generator) * spread + offset
    for dtype, tolerance in ((torch.float32, 1e-5 if offset == 0 else 1e-3), (torch.bfloat16, 2e-2)):
        part, arrived = x.to(dtype), torch.zeros(6, dtype=torch.int32)
        got = normalise(part, weight, bias, arrived, bias=late, silu=False, tuning=Tuning(slice=slice))
        wanted = (part.float() + late).permute(0, 3, 1, 2)
        wanted = torch.nn.functional.group_norm(wanted, 32, weight, bias, 1e-6)
        assert got.dtype == dtype
        torch.testing.assert_close(got.permute(0, 3, 1, 2).float(), wanted, rtol=tolerance, atol=tolerance)


def test_programs_wait_for_each_other_only_where_a_gpu_runs_them_all(monkeypatch):
    """Else CUDA refuses the launch: 512 channels in two tiles take 69 KiB, as compiled for sm_90."""
    for processors, memory, wanted in ((132, 228, (528, 528, 396)), (128, 100, (512, 256, 128))):
        monkeypatch.setattr(triton_vae, "_processors", lambda device, of=(processors, memory << 10): of)
        given = ((1, 70656), (8, 35840), (2, 70656))  # tiles, bytes
        assert tuple(waiting(Tuning(), *each, None) for each in given) == wanted
    assert [triton_vae.shares(width) for width in (32, 64, 512, 4096)] == [1, 1, 8, 32]
    monkeypatch.setattr(triton_vae, "_processors", lambda device: (2, 4096))  # none: two launches
    monkeypatch.setattr(triton_vae, "_normalise", None)
    x, weight, bias = torch.randn(2, 8, 16, 128), torch.rand(128), torch.rand(128)
    arrived = torch.zeros(4, dtype=torch.int32)
    tuning = Tuning(tile=512, slice=1 << 20)
    got = normalise(x, weight, bias, arrived, bias=torch.zeros(128), silu=False, tuning=tuning)
    wanted = torch.nn.functional.group_norm(x.permute(0, 3, 1, 2), 32, weight, bias, 1e-6)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), wanted, rtol=1e-4, atol=1e-4)


def test_widths_that_are_no_powers_of_two_are_refused():
    with pytest.raises(ConfigError, match=r"\[96, 192\].*--target.compile False"):
        FusedEncoder(AutoencoderKL(AutoencoderShape(width=96, multipliers=(1, 2), latent=4)))
