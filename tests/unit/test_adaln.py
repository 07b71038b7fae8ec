"""AdaLN between two branches: our kernels in Triton's interpreter against what is written, with every
gradient; and the decoder whose layers leave additions to the next norm."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from test_ablations import CHANNELS, groups, lively, seats  # noqa: F401 (fixtures)
from test_models import build, small
from torch import Tensor

from nextvid_mcore.models import adaln, fused

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu/test_pieces.py")


@pytest.fixture
def kernels(monkeypatch) -> None:
    """Our kernels are taken, inside `fused.eager()` what is written."""
    monkeypatch.setattr(fused, "compiles", lambda x: fused._state["compile"])


def both(s: int, rows: int, width: int, added: bool, past: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs and gradients by our kernels, and in fp32 by what is written."""
    generator = torch.Generator().manual_seed(s * rows + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, y, bias, six = draw(s, rows, width) + 5, draw(s, rows, width), draw(width), draw(1, rows, 6 * width)
    weights = [draw(s, rows, width) for _ in range(2)]

    def values(dtype: torch.dtype) -> list[Tensor]:
        leaves = [z.detach().clone().to(dtype).requires_grad_() for z in (x, y, bias, six)]
        shift, scale, gate, *_ = leaves[3].chunk(6, dim=-1)  # as Modulation gives them
        found = fused.gated_norm(
            leaves[0] * 1, fused.Added(*leaves[1:3], gate) if added else None, shift, scale, 1e-5
        )
        used = leaves if added else [leaves[0], leaves[3]]
        total = sum(
            (z * w).float().sum() for z, w in zip(found[1 - past :], weights[1 - past :], strict=True)
        )
        return [z.detach() for z in found] + list(torch.autograd.grad(total, used))

    found = values(dtype)
    with fused.eager():
        wanted = values(torch.float32)
    return [found, wanted]


@interpreted
@pytest.mark.parametrize(("added", "past"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("s", "rows", "width"), [(37, 3, 384), (16, 11, 48), (5, 1, 200), (70, 2, 33), (32, 2, 64)]
)
def test_gated_norm(kernels, s: int, rows: int, width: int, added: bool, past: bool) -> None:
    found, wanted = both(s, rows, width, added, past, torch.float32)
    assert len(found) == len(wanted) == (6 if added else 4)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4)


def test_shares_of_tokens(monkeypatch) -> None:
    """On an H100, which holds 528 programs: one round where rows allow it, else rounds that are full."""
    from nextvid_mcore.models import triton_adaln

    monkeypatch.setattr(triton_adaln.triton_pieces, "processors", lambda device: 132)
    for (s, rows), wanted in {(256, 224): 128, (256, 448): 256, (256, 672): 88, (256, 560): 32}.items():
        assert triton_adaln.share_of.__wrapped__(s, rows, None) == wanted, rows
    assert triton_adaln.share_of.__wrapped__(3, 1, None) == 4


@interpreted
def test_gated_norm_in_bf16(kernels) -> None:
    found, wanted = both(21, 5, 384, True, True, torch.bfloat16)
    for a, b in zip(found, wanted, strict=True):
        assert (
            a.dtype == torch.bfloat16 and (a.float() - b).norm() < 2e-2 * b.norm()
        )  # it rounds towards zero


@interpreted
@pytest.mark.parametrize("condition", ["concat", "cross_self"])
def test_a_decoder_by_our_kernels(monkeypatch, groups, condition: str) -> None:  # noqa: F811
    """Velocity and all gradients; the norm takes what the layer before left to be added."""
    config = lively(small().altered(model={"condition": condition, "image_size": 32}))
    given = adaln.fused.gated_norm
    found, calls = [], []

    def by_kernels(x: Tensor, added: tuple | None, *rest: object) -> tuple[Tensor, Tensor]:
        from nextvid_mcore.models import triton_adaln

        calls.append(added is not None)
        return triton_adaln.GatedNorm.apply(x, *(added or (None,) * 3), *rest)

    for function in (given, by_kernels):
        monkeypatch.setattr(fused, "gated_norm", function)
        decoder = build(config, groups).decoder
        n, generator = config.model.tokens_per_frame, torch.Generator().manual_seed(1)
        z = torch.randn(n, 3, config.model.predictor.width, generator=generator, requires_grad=True)
        noisy = torch.randn(n, 3, CHANNELS, generator=generator)
        velocity = decoder(z, noisy, torch.rand(3, generator=generator))
        leaves = [z, *decoder.parameters()]
        weights = torch.randn(velocity.shape, generator=generator)
        found.append([velocity.detach(), *torch.autograd.grad(velocity, leaves, weights, allow_unused=True)])
    assert calls == [False] + [True] * 2 * config.model.decoder.depth
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_a_pass_that_fails_keeps_nothing(groups) -> None:  # noqa: F811
    """What waits between layers holds the activations of its pass: where memory was full, the next one's."""
    config = lively(small().altered(model={"image_size": 32}))
    decoder = build(config, groups).decoder
    n, width = config.model.tokens_per_frame, config.model.predictor.width
    given = torch.randn(n, 2, width), torch.randn(n, 2, CHANNELS), torch.rand(2)
    full = mock.Mock(side_effect=torch.OutOfMemoryError)
    for module in (decoder.block.layers[1].adaln, decoder.final_adaln):
        with mock.patch.object(module, "forward", full), pytest.raises(torch.OutOfMemoryError):
            decoder(*given)
        assert not any(layer.behind.added for layer in decoder.block.layers)
