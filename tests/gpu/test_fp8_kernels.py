"""Kernels that write FP8 against what they stand for, on one GPU.

python -m pytest -q -rs tests/gpu/test_fp8_kernels.py
"""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("width", [128, 1408])
def test_norm_kernel(width: int) -> None:
    from nextvid_mcore.models import triton_fp8

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1000, width, generator=generator).bfloat16()
    vectors, scale = torch.randn(3, width, generator=generator).bfloat16(), torch.tensor(50.0)
    found = {}
    for device in ("cuda", "cpu"):
        amax, (bias, weight, shift) = torch.zeros(1, device=device), vectors.to(device)
        given = (x.to(device), y.to(device), bias, weight, shift, 1e-6, scale.to(device), amax)
        total, low = triton_fp8.norm(*given, torch.float8_e4m3fn)
        found[device] = [z.cpu().float() for z in (total, low.rows, low.inverse, amax)]
    (total, low, inverse, amax), wanted = found.values()
    # the reference rounds y + bias to bf16 before it adds x: half a step at 8, of which 50 / sqrt(3) weights
    torch.testing.assert_close(total, wanted[0], rtol=2e-2, atol=4e-2)
    torch.testing.assert_close(low, wanted[1], rtol=0.13, atol=2.0)
    assert ((low - wanted[1]).norm() / wanted[1].norm()).item() < 0.03
    torch.testing.assert_close(inverse, wanted[2])
    torch.testing.assert_close(amax, wanted[3], rtol=2e-2, atol=0)


@pytest.mark.parametrize("shape", [(1000, 384), (4096, 1536)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_gelu_kernels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from nextvid_mcore.models import triton_fp8

    generator = torch.Generator().manual_seed(0)
    x, dy, bias = (torch.randn(*s, generator=generator).bfloat16() for s in (shape, shape, shape[1:]))
    x[0, 0] = dy[0, 0] = 30.0  # beyond what the scale leaves room for
    scale = torch.tensor(torch.finfo(dtype).max / 8)

    def both(device: str) -> list:
        given, amax = (each.to(device) for each in (x, bias, scale)), torch.zeros(3, 1, device=device)
        x_, bias_, scale_ = given
        found = [triton_fp8.gelu(x_, bias_, scale_, amax[i], dtype, bool(i)) for i in range(2)]
        back, sums = triton_fp8.gelu_backward(dy.to(device), x_, bias_, scale_, amax[2], dtype)
        return [*found, back, sums.cpu().float(), amax.cpu()]

    found, wanted = both("cuda"), both("cpu")
    torch.testing.assert_close(found[4], wanted[4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[3], wanted[3], rtol=1e-2, atol=1e-2)
    for a, b in zip(found[:3], wanted[:3], strict=True):
        a_rows, b_rows = a.rows.cpu().float(), b.rows.float()
        assert a_rows.isfinite().all() and a_rows.abs().max() == torch.finfo(dtype).max
        assert (a_rows != b_rows).float().mean() < 2e-3  # nearly ties
        torch.testing.assert_close(a_rows, b_rows, rtol=0.3, atol=1e-2)
        torch.testing.assert_close(a.inverse.cpu(), b.inverse)
        if b.columns is not None:
            assert torch.equal(a.columns.cpu().float(), a_rows.t())


def test_kernels_pass_their_check() -> None:
    """At ViT-G's widths, as a run calls it before it starts."""
    from nextvid_mcore import recipes
    from nextvid_mcore.config.fp8 import ROLES
    from nextvid_mcore.models import fp8_check, fp8_mlp
    from nextvid_mcore.models.specs import transformer_config
    from nextvid_mcore.parallel.groups import Layout
    from nextvid_mcore.parallel.split import make_split

    fp8_mlp.use(True)
    for form in ("hybrid", "e4m3"):
        for recompute in ("none", "pieces"):
            config = recipes.get("vit_g").altered(
                fp8={"all": "delayed", "format": form}, parallel={"recompute": recompute}
            )
            splits = {role: make_split(config, Layout(), role) for role in ROLES}
            shapes = {role: config.model.shape(role) for role in ROLES}
            networks = {r: transformer_config(shapes[r], config.model, splits[r]) for r in ROLES}
            fp8_check.check(config, networks, torch.device("cuda", 0))


def test_attention_writes_fp8() -> None:
    """As the same kernel's bf16 would be rounded, and by the other kernel too."""
    from nextvid_mcore.models import kernels, triton_prefix

    if torch.cuda.get_device_capability() != kernels.HOPPER:
        pytest.skip(f"the kernel is for Hopper, this is {torch.cuda.get_device_name()}")
    torch.manual_seed(0)
    frame, rows, heads, width = 256, 2, 3, 64
    packed = torch.randn(3 * frame, rows, heads, 3, width, device="cuda", dtype=torch.bfloat16)
    parts = [x.permute(1, 2, 0, 3) for x in packed.unbind(3)]
    for module in (kernels.ours("prefix"), triton_prefix):
        scale, amax = torch.tensor(4000.0, device="cuda"), torch.zeros(1, device="cuda")
        wanted = module.attend(*parts, frame).permute(2, 0, 1, 3).reshape(3 * frame * rows, -1).float()
        low = module.attend_low(*parts, frame, scale, amax, torch.float8_e4m3fn)
        torch.testing.assert_close(amax[0], wanted.abs().max(), rtol=1e-2, atol=0)
        torch.testing.assert_close(low.inverse[0], 1 / scale)
        found, high = low.rows.float(), (wanted * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert high.abs().max() == 448
        torch.testing.assert_close(found, high, rtol=0.13, atol=0.1)
        assert ((found - high).norm() / high.norm()).item() < 0.02


@pytest.mark.parametrize(("rows", "width"), [(1000, 128), (16128, 1408)])
def test_norm_in_both_directions(rows: int, width: int) -> None:
    from nextvid_mcore.models import triton_fp8

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, rows, width, generator=generator).bfloat16()
    bias, weight, shift = torch.randn(3, width, generator=generator).bfloat16()
    for added in ((None, None), (y, bias)):
        found = {}
        for device in ("cuda", "cpu"):
            given = (z if z is None else z.to(device) for z in (x, *added, weight, shift))
            amax, scale = torch.zeros(1, device=device), torch.tensor(50.0, device=device)
            total, low, *moments = triton_fp8.norm_both(*given, 1e-6, scale, amax, torch.float8_e4m3fn)
            assert torch.equal(low.columns.view(torch.uint8), low.rows.view(torch.uint8).t())
            found[device] = [z.cpu().float() for z in (total, low.rows, low.inverse, amax, *moments)]
        (total, low, inverse, amax, *moments), wanted = found.values()
        torch.testing.assert_close(total, wanted[0], rtol=2e-2, atol=4e-2)  # see test_norm_kernel
        torch.testing.assert_close(low, wanted[1], rtol=0.13, atol=4.0)
        assert ((low - wanted[1]).norm() / wanted[1].norm()).item() < 0.03
        torch.testing.assert_close(inverse, wanted[2])
        torch.testing.assert_close(amax, wanted[3], rtol=2e-2, atol=0)
        for a, b in zip(moments, wanted[4:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1000, 3, 64), (16128, 22, 64), (100, 9, 24)])
def test_rotation_back(dtype: torch.dtype, tokens: int, heads: int, width: int) -> None:
    from nextvid_mcore.models import triton_fp8
    from nextvid_mcore.rope import angles, turns

    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, tokens, heads, width, generator=generator).bfloat16()
    grads[0, 0, 0, 0] = 30.0  # beyond what the scale leaves room for
    cos, sin = turns(angles(torch.randint(0, 16, (tokens, 3), generator=generator), width))
    found = {}
    for device in ("cuda", "cpu"):
        amax, scale = torch.zeros(1, device=device), torch.tensor(torch.finfo(dtype).max / 8, device=device)
        given = list(grads.to(device)), cos.to(device), sin.to(device)
        low, bias = triton_fp8.turn_backward(*given, scale, amax, dtype)
        assert torch.equal(low.columns.view(torch.uint8), low.rows.view(torch.uint8).t())
        found[device] = [z.cpu().float() for z in (low.rows, bias, low.inverse, amax)]
    (low, bias, inverse, amax), wanted = found.values()
    assert low.isfinite().all() and low.abs().max() == torch.finfo(dtype).max
    assert (low != wanted[0]).float().mean() < 1e-2  # ties, and products that are rounded once
    torch.testing.assert_close(low, wanted[0], rtol=0.3, atol=0.1)
    torch.testing.assert_close(bias, wanted[1], rtol=2e-2, atol=0.1)
    torch.testing.assert_close(inverse, wanted[2])
    torch.testing.assert_close(amax, wanted[3], rtol=1e-5, atol=0)
