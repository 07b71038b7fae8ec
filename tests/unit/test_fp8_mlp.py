"""The MLP whose GELU quantises: its kernels in Triton's interpreter, and its products by doubles of
Transformer Engine's that keep fp32; tests/gpu/test_fp8.py compares the real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from te_double import SCALE, Cuda, Linear, engine, plain  # noqa: F401 (a fixture)

from nextvid_mcore.models import fp8_mlp


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu/test_fp8.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "width"), [(40, 48), (33, 16)])
def test_kernels_are_what_they_stand_for(monkeypatch, dtype: torch.dtype, rows: int, width: int) -> None:
    from nextvid_mcore.models import triton_fp8 as t

    for name in ("TILE", "FLAT", "BACK"):
        monkeypatch.setattr(t, name, {"BR": 32, "BC": 16})
    x, dy, bias = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    scale = torch.tensor(100.0)
    for columns in (False, True):
        most = [torch.full((1,), start) for start in (0.0, 0.0, 9.0, 9.0)]
        found = t.gelu(x.as_subclass(Cuda), bias, scale, most[0], dtype, columns)
        back, sums = t.gelu_backward(dy, x.as_subclass(Cuda), bias, scale, most[2], dtype)
        wanted = t.gelu(x, bias, scale, most[1], dtype, columns)
        wanted_back, wanted_sums = t.gelu_backward(dy, x, bias, scale, most[3], dtype)
        assert wanted.rows.float().abs().max() > 100
        torch.testing.assert_close(most[0], most[1])
        torch.testing.assert_close(most[2], most[3], rtol=1e-4, atol=0)
        torch.testing.assert_close(plain(sums), wanted_sums, rtol=1e-4, atol=1e-3)
        assert (found.columns is not None) == columns
        for a, b in ((found, wanted), (back, wanted_back)):
            low, high = plain(a.rows).float(), b.rows.float()
            torch.testing.assert_close(plain(a.inverse), b.inverse)
            if a.columns is not None:
                assert torch.equal(plain(a.columns).float(), low.t())
        if columns:  # alone
            alone = t.gelu(x.as_subclass(Cuda), bias, scale, most[0], dtype, columns=True, rows=False)
            assert alone.rows is None and torch.equal(plain(alone.columns), plain(found.columns))
            if dtype == torch.float32:
                torch.testing.assert_close(low, high, rtol=1e-4, atol=2e-3)  # the tail's relative 5e-5
            else:  # the interpreter rounds its own way: by a step or two
                assert (low - high).norm() < 0.2 * high.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu/test_fp8.py")
def test_norm_is_what_it_stands_for() -> None:
    from nextvid_mcore.models import triton_fp8 as t

    x, y = torch.randn(2, 5, 24)
    bias, weight, shift = torch.randn(3, 24)
    for added in ((None, None), (y, bias)):
        most = torch.zeros(2, 1)
        rest = (*added, weight, shift, 1e-5, torch.tensor(100.0))
        total, found = t.norm(x.as_subclass(Cuda), *rest, most[0], torch.float32)
        wanted_total, wanted = t.norm(x, *rest, most[1], torch.float32)
        torch.testing.assert_close(plain(total), wanted_total)
        torch.testing.assert_close(plain(found.rows), wanted.rows, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(most[0], most[1])
        torch.testing.assert_close(plain(found.inverse), wanted.inverse)
        assert found.columns is None


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("cached", [True, False])
def test_products_and_gradients(te, monkeypatch, cached: bool, remade: bool) -> None:
    torch.manual_seed(0)
    one, two = Linear(16, 48), Linear(48, 16)
    one.disable_parameter_transpose_cache = two.disable_parameter_transpose_cache = not cached
    weights = []
    monkeypatch.setattr(
        fp8_mlp, "weight", lambda *a, made=fp8_mlp.weight: weights.append(made(*a)) or weights[-1]
    )
    module = SimpleNamespace(linear_fc1=one, linear_fc2=two, config=SimpleNamespace(recompute_pieces=remade))
    x = torch.randn(5, 8, 16, requires_grad=True)
    wanted = F.linear(F.gelu(F.linear(x, one.weight, one.bias)), two.weight)
    dy = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (x, one.weight, one.bias, two.weight), dy)
    found = []
    for _ in range(2):  # the second micro-batch takes the first one's weights
        y, bias = fp8_mlp.mlp(module, x)
        kept, told = y.grad_fn.next_functions[0][0].inside.kept, two.made[0].amax.clone()
        _, _, low_x, _, low_a, *_ = kept
        assert low_x.data is None and (low_a is None) == remade
        two.made[0].scale = torch.tensor(SCALE * 2)  # the pass has ended and scales are renewed
        assert bias is two.bias and one.open == two.open == 0
        found = torch.autograd.grad(y, (x, one.weight, one.bias, two.weight), dy)
        assert torch.equal(two.made[0].amax, told)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(found[0], grads[0])
    torch.testing.assert_close(found[2], grads[2])
    for linear, grad in ((one, grads[1]), (two, grads[3])):
        torch.testing.assert_close(linear.weight.main_grad, 1 + 2 * grad)
        assert linear.weight.grad_added_to_main_grad and not linear.is_first_microbatch
        assert bool(linear._fp8_workspaces) == cached
        assert linear.made[1].seen == (1 if cached else 2)
    # between the two passes the rows of weights that nobody keeps are gone
    assert all((low.data is not None) == cached and low.data_transpose is not None for low in weights)
    hidden = F.gelu(F.linear(x, one.weight, one.bias))
    torch.testing.assert_close(two.made[0].amax[0], hidden.abs().max())
    assert one.made[2].amax > 0 and one.made[2].seen == 0  # written by the derivative, not by a pass


def test_without_gradient_one_direction_is_made(te) -> None:
    one, two = Linear(16, 48), Linear(48, 16)
    for linear in (one, two):
        linear.disable_parameter_transpose_cache = True  # a pass to be recorded
    x = torch.randn(5, 8, 16)
    with torch.no_grad():
        for _ in range(2):
            y, _ = fp8_mlp.mlp(SimpleNamespace(linear_fc1=one, linear_fc2=two, config=None), x)
    wanted = F.linear(F.gelu(F.linear(x, one.weight, one.bias)), two.weight)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert not (one.made[0].both or two.made[1].both) and two.made[1].seen == 2 and not two._fp8_workspaces


def test_what_goes_this_way(monkeypatch) -> None:
    plain = {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "tensor_model_parallel_size": 1,
        "recompute_granularity": None,
    }
    assert not fp8_mlp.fits(SimpleNamespace(**plain), torch.zeros(1))
    x = SimpleNamespace(is_cuda=True)
    assert fp8_mlp.fits(SimpleNamespace(**plain), x)
    for change in (
        {"fp8": None},
        {"fp8_recipe": "tensorwise"},
        {"tensor_model_parallel_size": 2},
        {"recompute_granularity": "full"},
    ):
        assert not fp8_mlp.fits(SimpleNamespace(**plain | change), x)
    monkeypatch.setitem(fp8_mlp._state, "on", False)
    assert not fp8_mlp.fits(SimpleNamespace(**plain), x)
