"""A decoder's layer whose norms and gates write FP8: its kernels in Triton's interpreter, layers in a row
with doubles of Transformer Engine's parts that keep fp32; tests/gpu has the real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from te_double import SCALE, Cuda, Linear, Roll, engine, plain  # noqa: F401 (a fixture)
from test_fp8_layer import HEADS, ROWS, TOKENS, WIDTH, Attention
from torch import Tensor

from nextvid_mcore import rope
from nextvid_mcore.models import fp8_adaln, fp8_layer, fused

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu")
LOW = [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]


def drawn(s: int, rows: int, width: int) -> list[Tensor]:
    """x, y, bias, gate, shift and scale."""
    torch.manual_seed(s)
    gate, shift, scale = torch.randn(1, rows, 6 * width).chunk(6, -1)[:3]
    return [
        torch.randn(s, rows, width) + 3,
        torch.randn(s, rows, width),
        torch.randn(width),
        gate,
        shift,
        scale,
    ]


@interpreted
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("s", "rows", "width"), [(18, 3, 48), (7, 2, 200)])
def test_kernels_that_write_fp8(dtype: torch.dtype, s: int, rows: int, width: int) -> None:
    from nextvid_mcore.models import triton_adaln as t

    x, y, bias, gate, shift, scale = drawn(s, rows, width)
    dnormed, dpast = torch.randn(2, s, rows, width)

    def near(found: Tensor, wanted: Tensor) -> None:
        if found.dtype in (
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        ):  # which the interpreter rounds its own way
            found, wanted = plain(found).float(), wanted.float()
            assert (found - wanted).norm() < 0.2 * wanted.norm()
        else:
            torch.testing.assert_close(plain(found), wanted, rtol=1e-4, atol=1e-3)

    for added in (True, False):
        stream = (y, bias, gate) if added else (None,) * 3
        most, found, back = torch.zeros(4, 1), [], []
        for i, kind in enumerate((Cuda, Tensor)):
            given = [None if z is None else z.as_subclass(kind) for z in (x, *stream, shift, scale)]
            total, low, *moments = t.forward(*given, 1e-5, low=t.Quantum(torch.tensor(20.0), most[i], dtype))
            assert low.columns is None and low.rows.shape == (s * rows, width)
            found.append([total, low.rows, low.inverse, *moments])
            if added:
                saved = (total, *given[1:4], given[5], *moments)
                given = dnormed.as_subclass(kind), dpast.as_subclass(kind), *saved
                dx, low, *rest = t.backward(*given, low=t.Quantum(torch.tensor(9.0), most[2 + i], dtype))
                back.append([dx, low.rows, low.inverse, *rest])
        for pair in (found, back)[: 1 + added]:
            for a, b in zip(*pair, strict=True):
                near(a, b)
        torch.testing.assert_close(most[::2], most[1::2], rtol=1e-4, atol=1e-4)
        assert most[0] > 1 and (most[2] > 1) == added


class Attended(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: None) -> Tensor:
        assert pattern is None
        return super().attend(q, k, v, "pattern")


class Layer(torch.nn.Module):
    """What fp8_adaln asks of AdaLNLayer."""

    def __init__(self, remade: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(layernorm_epsilon=1e-5, recompute_pieces=remade)
        self.self_attention = Attended()
        self.linears = torch.nn.ModuleList((self.self_attention.linear_qkv, self.self_attention.linear_proj))
        self.mlp = torch.nn.Module()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = Linear(WIDTH, 48), Linear(48, WIDTH)
        self.mlp.config = self.config
        self.adaln = torch.nn.Linear(WIDTH, 6 * WIDTH)

    def plain(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition).chunk(6, -1)
        qkv, proj = self.linears
        normed = fused.modulate(x, shift1, scale1, 1e-5)
        q, k, v = F.linear(normed, qkv.weight, qkv.bias).unflatten(2, (HEADS, 3, -1)).unbind(3)
        q, k = (rope.rotate(each, angles[:, :, None]) for each in (q, k))
        x = x + gate1 * F.linear(self.self_attention.attend(q, k, v, None), proj.weight, proj.bias)
        one, two = self.mlp.linear_fc1, self.mlp.linear_fc2
        hidden = F.gelu(F.linear(fused.modulate(x, shift2, scale2, 1e-5), one.weight, one.bias))
        return x + gate2 * F.linear(hidden, two.weight, two.bias)


@interpreted
@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("by_kernels", [False, True])
def test_layers_in_training(te: Roll, monkeypatch, remade: bool, by_kernels: bool) -> None:
    """by_kernels: the last norm, in the tensors' own precision, hands on its gate's gradient in FP8 too."""
    torch.manual_seed(0)
    layers = [Layer(remade) for _ in range(2)]
    angles = rope.angles(
        rope.token_positions(torch.arange(TOKENS * ROWS).view(TOKENS, ROWS), 4, 4), WIDTH // 2
    )
    x, condition = torch.randn(TOKENS, ROWS, WIDTH), torch.randn(1, ROWS, WIDTH)
    shift, scale = torch.randn(2, 1, ROWS, WIDTH)
    leaves = [x.requires_grad_(), condition.requires_grad_(), *(p for z in layers for p in z.parameters())]
    y = x
    for layer in layers:
        y = layer.plain(y, condition, angles)
    y = fused.modulate(y, shift, scale, 1e-5)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, dy)
    ours, last = x, None
    for layer in layers:
        vectors = layer.adaln(condition).chunk(6, -1)
        ours, last = fp8_adaln.layer(layer, ours, last, vectors, rope.turns(angles))
    monkeypatch.setattr(fused, "compiles", lambda x: by_kernels)
    _, ours = fused.gated_norm(ours, last, shift, scale, 1e-5)
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
    assert te.renewed == 0
    ours.backward(dy)
    assert te.renewed == 1
    for leaf, grad in zip(leaves, wanted, strict=True):
        found = leaf.main_grad - 1 if hasattr(leaf, "main_grad") else leaf.grad
        torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-3)
    for layer in layers:
        (qkv, proj), (one, two) = layer.linears, (layer.mlp.linear_fc1, layer.mlp.linear_fc2)
        assert [z.made[0].seen for z in (qkv, proj, one, two)] == [0, 1, 0, 0]
        of_autograd = layer is layers[-1] and not by_kernels  # nobody past it writes FP8 then
        assert [z.made[2].seen for z in (qkv, proj, one, two)] == [0, 0, 0, int(of_autograd)]
        assert all(z.made[i].amax > 0 for z in (qkv, proj, one, two) for i in (0, 2)) and qkv.open == 0


@interpreted
def test_a_gradient_that_nobody_put_is_seen(te: Roll) -> None:
    """What stands for a gradient that is kept elsewhere is no number."""
    from nextvid_mcore.models.fp8_products import Gradient
    from nextvid_mcore.models.triton_fp8 import Scaled

    sink, like = Gradient(Linear(4, 4).made[2]), torch.randn(6, 4)
    stands_for = sink.put(Scaled(like * SCALE, None, torch.tensor([1 / SCALE])), like)
    assert stands_for.shape == like.shape and stands_for.isnan().all()
    low = sink.take(stands_for)
    torch.testing.assert_close(low.rows(), like)
    torch.testing.assert_close(low.columns(), like.t())
    assert sink.take(stands_for).rows().isnan().all()  # once and no more


def test_what_goes_this_way(monkeypatch) -> None:
    from nextvid_mcore.models import triton_adaln

    monkeypatch.setattr(fp8_layer, "_SWITCHES", dict.fromkeys(fp8_layer.SWITCHES, True))
    monkeypatch.setattr(fp8_adaln.fp8_mlp, "fits", lambda config, x: config == "fits")
    x = torch.randn(2, 2, 8)
    for itself, config in ((True, "fits"), (False, "fits"), (True, "not")):
        module = SimpleNamespace(config=config, itself=itself)
        assert fp8_adaln.fits(module, x) == (itself and config == "fits")
    module = SimpleNamespace(config="fits", itself=True)
    with torch.no_grad():
        assert not fp8_adaln.fits(module, x)
    assert not fp8_adaln.fits(module, torch.empty(2, 2, triton_adaln.WIDEST + 1))
    fp8_layer.use(decoder=False)
    assert not fp8_adaln.fits(module, x)
