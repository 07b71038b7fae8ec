"""VA-VAE's encoder in pieces of Triton, which the interpreter runs, against the eager one."""

from __future__ import annotations

import pytest
import torch
from unit.narrow_vae import clip

from nextvid_mcore.config import ConfigError
from nextvid_mcore.targets import triton_vae
from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape
from nextvid_mcore.targets.cudnn_sum import Refused
from nextvid_mcore.targets.fused_vae import FusedEncoder
from nextvid_mcore.targets.triton_vae import Sum, Tuning, matrix_of, normalise, waiting


@torch.no_grad()
def autoencoder(multipliers: tuple[int, ...]) -> AutoencoderKL:
    torch.manual_seed(0)
    made = AutoencoderKL(AutoencoderShape(width=32, multipliers=multipliers, latent=4))
    for weight in made.parameters():
        if weight.ndim == 1:
            weight.add_(0.3 * torch.randn_like(weight))
    return made.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def joined(x, weight, rest, bias, out):
    """What cuDNN's graph does (targets/cudnn_sum.py)."""
    out.copy_(torch.nn.functional.conv2d(x, weight, bias, padding=1) + rest)


@pytest.mark.parametrize("how", [{}, {"joined": joined}])
@pytest.mark.parametrize(("multipliers", "shape"), [((1, 2), (2, 3, 24, 16)), ((2, 2), (1, 3, 16, 16))])
def test_the_fused_encoder_equals_the_eager_one(multipliers, shape, how):
    """Images of several slices, the last not full; a first block as wide as the first convolution, or not."""
    made = autoencoder(multipliers)
    frames = clip(shape)
    wanted = made.encode(frames)
    found = FusedEncoder(made, Tuning(tile=32 * 64, slice=32 * 128), **how)(frames)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_where_no_convolution_adds_residuals_others_do_and_it_is_said(caplog):
    def refuses(*tensors):
        raise Refused("no plan for this")

    made, frames = autoencoder((1, 2)), clip((1, 3, 16, 16))
    encoder = FusedEncoder(made, joined=refuses)
    for _ in range(2):
        torch.testing.assert_close(encoder(frames), made.encode(frames), rtol=1e-4, atol=1e-4)
    assert [r.getMessage() for r in caplog.records if "no plan for this" in r.getMessage()] == [
        "VA-VAE's convolutions don't add residuals here, and others do, slower: no plan for this"
    ]


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_its_norm_is_group_norm(offset):
    """Also where the mean is large against the spread: more than this bf16 can't hold."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = 1 + 0.2 * torch.randn(64, generator=generator), 0.2 * torch.randn(64, generator=generator)
    spread = 0.5 + torch.rand(64, generator=generator)
    x = torch.randn(3, 8, 16, 64, generator=generator) * spread + offset
    for dtype, tolerance in ((torch.float32, 1e-5 if offset == 0 else 1e-3), (torch.bfloat16, 2e-2)):
        part, arrived = x.to(dtype), torch.zeros(3, dtype=torch.int32)
        got, _ = normalise(
            Sum(torch.zeros(64), (part,)), weight, bias, arrived, silu=False, tuning=Tuning(slice=4096)
        )
        wanted = torch.nn.functional.group_norm(part.permute(0, 3, 1, 2).float(), 32, weight, bias, 1e-6)
        assert got.dtype == dtype
        torch.testing.assert_close(got.permute(0, 3, 1, 2).float(), wanted, rtol=tolerance, atol=tolerance)


def test_programs_wait_for_each_other_only_where_a_gpu_runs_them_all(monkeypatch):
    """Else CUDA refuses the launch: 512 channels in two tiles take 69 KiB, as compiled for sm_90."""
    for processors, memory, wanted in ((132, 228, (528, 528, 396)), (128, 100, (512, 256, 128))):
        monkeypatch.setattr(triton_vae, "_processors", lambda device, of=(processors, memory << 10): of)
        given = ((1, 70656), (8, 35840), (2, 70656))  # tiles, bytes
        assert tuple(waiting(Tuning(), *each, None) for each in given) == wanted
    monkeypatch.setattr(triton_vae, "_processors", lambda device: (2, 4096))  # none: two launches
    monkeypatch.setattr(triton_vae, "_normalise", None)
    x, weight, bias = torch.randn(2, 8, 16, 64), torch.rand(64), torch.rand(64)
    arrived = torch.zeros(2, dtype=torch.int32)
    got, _ = normalise(
        Sum(torch.zeros(64), (x,)), weight, bias, arrived, silu=False, tuning=Tuning(tile=512, slice=1 << 20)
    )
    wanted = torch.nn.functional.group_norm(x.permute(0, 3, 1, 2), 32, weight, bias, 1e-6)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), wanted, rtol=1e-4, atol=1e-4)


def test_widths_that_are_no_powers_of_two_are_refused():
    with pytest.raises(ConfigError, match=r"\[96, 192\].*--target.compile False"):
        FusedEncoder(AutoencoderKL(AutoencoderShape(width=96, multipliers=(1, 2), latent=4)))


@pytest.mark.parametrize("keep", [False, True])
def test_a_program_that_is_an_image_ahead_makes_the_same_of_each(keep):
    torch.manual_seed(0)
    x = Sum(torch.randn(64), tuple(torch.randn(7, 4, 4, 64) for _ in range(1 + keep)))
    weight, bias = torch.rand(64), torch.rand(64)
    waits, goes_on = (
        normalise(
            x, weight, bias, torch.zeros(7, dtype=torch.int32), keep=keep,
            tuning=Tuning(programs=1, ahead=ahead, hints=ahead),
        )[0]
        for ahead in (False, True)
    )  # fmt: skip
    assert torch.equal(waits, goes_on)
    wanted = torch.nn.functional.group_norm(
        (sum(x.parts) + x.bias).permute(0, 3, 1, 2), 32, weight, bias, 1e-6
    )
    torch.testing.assert_close(
        goes_on.permute(0, 3, 1, 2), torch.nn.functional.silu(wanted), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("at_once", [False, True])
def test_the_first_norm_leaves_what_it_was_of(at_once):
    made, frames = autoencoder((1, 2)), clip((2, 3, 8, 8))
    conv, norm = made.encoder.conv_in, made.encoder.down[0].block[0].norm1
    x = Sum(conv.bias, frames=frames, first=matrix_of(conv.weight))
    arrived, tuning = torch.zeros(2, dtype=torch.int32), Tuning(slice=1 << 20, at_once=at_once)
    normed, kept = normalise(x, norm.weight, norm.bias, arrived, keep=True, tuning=tuning)
    wanted = torch.nn.functional.conv2d(frames, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(kept.permute(0, 3, 1, 2), wanted, rtol=1e-4, atol=1e-5)
    normed = normed.permute(0, 3, 1, 2)
    torch.testing.assert_close(normed, torch.nn.functional.silu(norm(wanted)), rtol=1e-4, atol=1e-4)
