"""The fused pieces are what is written: compiled by torch's front end alone, Triton's kernels interpreted.

tests/gpu has both as they are compiled for the GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch._dynamo.utils import counters

from nextvid_mcore import rope, switches
from nextvid_mcore.models import fused

PIECES = [piece for piece in vars(fused).values() if hasattr(piece, "compiled")]


@pytest.fixture
def compiled(monkeypatch) -> None:
    """Every piece goes through torch.compile, on the CPU and without a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(fused, "compiles", lambda x: fused._state["compile"])
    torch._dynamo.reset()
    for piece in PIECES:
        piece.compiled.cache_clear()
    yield
    for piece in PIECES:
        piece.compiled.cache_clear()


def values(function, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of a fixed projection of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*(x * 1 for x in leaves))  # rotary pieces write over what they get
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in out).backward()
    return [x.detach() for x in out] + [x.grad for x in leaves]


def pieces(s: int, rows: int, width: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(s * rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, y, vector, row = draw(s, rows, width), draw(s, rows, width), draw(width), draw(1, rows, width)
    module = torch.nn.LayerNorm(width, eps=1e-5)
    module.weight.data.copy_(draw(width))
    turns = rope.turns(rope.angles(rope.token_positions(torch.arange(s * rows).view(s, rows), 4, 4), 16))
    qkv = draw(s, rows, 3 * 32)
    weight, bias = module.weight, module.bias
    del module.weight, module.bias  # to be leaves of the test

    def with_norm(function):
        def call(*args: Tensor):
            module.weight, module.bias = args[-2:]
            return function(*args[:-2], module, 1e-5)

        return call

    return [
        (fused.add, x, y, vector),
        (fused.bias_gelu, x, vector),
        (with_norm(fused.norm), x, weight, bias),
        (with_norm(fused.add_norm), x, y, vector, weight, bias),
        (lambda *a: fused.modulate(*a, 1e-6), x, row, row + 1),
        (fused.gated_add, x, y, vector, row),
        (fused._cosine, draw(s, 2, rows, width), draw(s, 1, rows, width)),
        (fused.squared_error, draw(s, 2, rows, width), draw(s, 1, rows, width)),
        (lambda a: fused.rotate_heads(3, a, 2, turns), qkv),
        (lambda a: fused.rotate_heads(2, a, 2, turns), qkv[..., :64]),
        (lambda a: fused.rotate_heads(1, a, 2, turns), qkv[..., :32]),
    ]


def test_compiled_equals_written_and_sizes_stay_open(compiled) -> None:
    graphs = []
    for s, rows in ((6, 2), (6, 3), (6, 5)):
        before = counters["stats"]["unique_graphs"]
        for function, *inputs in pieces(s, rows, 24):
            with fused.eager():
                wanted = values(function, *inputs)
            found = values(function, *inputs)
            assert len(wanted) == len(found) >= 2
            for a, b in zip(wanted, found, strict=True):
                torch.testing.assert_close(a, b)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs == [7, 0, 0]  # more rows compile nothing again


@pytest.fixture
def whole_pixels() -> Iterator[None]:
    with switches.changed(pixels=True):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_wherever_they_lie(compiled, whole_pixels, dtype: torch.dtype) -> None:
    video = torch.arange(256, dtype=torch.uint8).repeat(6).view(2, 3, 4, 8, 8)
    before = counters["stats"]["unique_graphs"]
    for clips in (2, 3, 5):
        clip = video.repeat(3, 1, 1, 1, 1)[:clips]
        patches = rearrange(clip, "b c (t u) (h v) (w x) -> b t h w c u v x", u=2, v=4, x=4)
        for x in (clip, patches):
            found = fused.pixels(x, dtype)
            wanted = (x.double() / 127.5 - 1).to(dtype)
            assert found.dtype == dtype and found.is_contiguous() and not patches.is_contiguous()
            torch.testing.assert_close(found, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=2e-7)
            with fused.eager():
                assert torch.equal(fused.pixels(x, dtype), found)
    assert counters["stats"]["unique_graphs"] - before == 2  # more clips compile nothing again


def test_rotated_heads_are_ropes() -> None:
    s, rows, heads, d = 5, 2, 3, 16
    positions = rope.token_positions(torch.arange(s * rows).view(s, rows) * 3, 4, 4)
    angles = rope.angles(positions, d)
    packed = torch.randn(s, rows, heads * 3 * d)
    q, k, v = fused.rotate_heads(3, packed, heads, rope.turns(angles))
    parts = packed.view(s, rows, heads, 3, d).unbind(3)
    torch.testing.assert_close(q, rope.rotate(parts[0], angles[:, :, None]))
    torch.testing.assert_close(k, rope.rotate(parts[1], angles[:, :, None]))
    assert torch.equal(v, parts[2])


@pytest.mark.parametrize("d", [6, 24, 32, 64])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_heads_of_any_width_turn_to_the_bit(compiled, d: int, parts: int) -> None:
    """Nine heads are two programs' with one to spare, 21 tokens two programs'.

    In bf16 up to its rounding, which Triton's interpreter does towards zero.
    """
    s, rows, heads = 7, 3, 9
    positions = rope.token_positions(torch.arange(s * rows).view(s, rows) * 3, 4, 4)
    turns = rope.turns(rope.angles(positions, d))
    kept = 2 * turns.shape[-1]
    packed = torch.randn(s, rows, heads * parts * d, generator=torch.Generator().manual_seed(d))
    packed.view(s, rows, -1, d)[..., kept:] = -0.0

    def turned(dtype: torch.dtype) -> list[Tensor]:
        return values(lambda x: fused.rotate_heads(parts, x, heads, turns), packed.to(dtype))

    for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2**-7)):
        found = turned(dtype)
        with fused.eager():
            wanted = turned(dtype)
        assert len(found) == len(wanted) == parts + 1
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=rounding, atol=0)
        assert all(x[..., kept:].signbit().all() for x in found[:-1])


@pytest.mark.parametrize(("rows", "width"), [(1300, 70), (5, 3), (512, 1), (1024, 64)])
def test_moments_by_shares(compiled, rows: int, width: int) -> None:
    """Of bf16 too; far from zero, where a difference of raw moments would be noise."""
    from nextvid_mcore.training.monitors import Moments

    x = 1000 + torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    found = fused.moments(x)
    assert len(found) == -(-rows // 512) and found[:, 0].sum() == rows
    whole = Moments.of(x[:, None])  # whatever the leading dimensions
    assert whole.packed[0] == rows
    mean, deviations = whole.packed[1:].chunk(2)
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-6, atol=0)
    wanted = (x.double() - x.double().mean(0)).square().sum(0)
    torch.testing.assert_close(deviations, wanted, rtol=2e-3, atol=1e-4)
    low = (x - 1000).bfloat16()
    torch.testing.assert_close(fused.moments(low), fused.moments(low.float()))


def test_gelu_is_exact() -> None:
    x, zero = torch.tensor([[[1.0, -0.5]]]), torch.zeros(2)
    wanted = [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in (1.0, -0.5)]
    assert fused.bias_gelu(x, zero).flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_launches_of_many_rows_stay_within_what_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second axis ends at 65,535: of 8 rows each, those of 36 clips at tau 4."""
    from nextvid_mcore.models import triton_fp8, triton_pieces

    class Launches(list):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: self.append(grid)

    launches = Launches()
    for module in (triton_pieces, triton_fp8):
        for name in ("_gelu_forward", "_gelu_backward"):
            monkeypatch.setattr(module, name, launches)
    monkeypatch.setattr(triton_pieces, "_add_up", launches)
    x = torch.empty(2**20, 300, device="meta", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.empty(300, device="meta", dtype=torch.bfloat16, requires_grad=True)
    triton_pieces.BiasGelu.apply(x, bias).backward(x.detach())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    scale = torch.empty(1, device="meta")
    for columns in (False, True):
        triton_fp8.gelu(x.detach(), bias.detach(), scale, scale, torch.float8_e4m3fn, columns)
    assert len(launches) == 5
    assert all(size <= 65_535 for grid in launches for size in grid[1:])
