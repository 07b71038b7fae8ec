"""AdaLN between two branches: our kernels in Triton's interpreter against what is written, with every
gradient; and the decoder whose layers leave additions to the next norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextvid_mcore.models import fused

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu/test_pieces.py")


@pytest.fixture
def kernels(monkeypatch) -> None:
    """Our kernels are taken, inside `fused.eager()` what is written."""
    monkeypatch.setattr(fused, "compiles", lambda x: fused._state["compile"])
    monkeypatch.setitem(fused._state, "gated_norm", True)


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
        found = fused.gated_norm(leaves[0] * 1, (*leaves[1:3], gate) if added else None, shift, scale, 1e-5)
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
@pytest.mark.parametrize(("s", "rows", "width"), [(37, 3, 384), (16, 11, 48), (5, 1, 200), (70, 2, 33)])
def test_gated_norm(kernels, s: int, rows: int, width: int, added: bool, past: bool) -> None:
    found, wanted = both(s, rows, width, added, past, torch.float32)
    assert len(found) == len(wanted) == (6 if added else 4)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4)


@interpreted
def test_gated_norm_in_bf16(kernels) -> None:
    found, wanted = both(21, 5, 384, True, True, torch.bfloat16)
    for a, b in zip(found, wanted, strict=True):
        assert (
            a.dtype == torch.bfloat16 and (a.float() - b).norm() < 2e-2 * b.norm()
        )  # it rounds towards zero
