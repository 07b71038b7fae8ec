"""An encoder layer whose norms, attention and rotation write FP8: its kernels in Triton's interpreter, the
layer with doubles of Transformer Engine's parts that keep fp32; tests/gpu has the real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from te_double import SCALE, Cuda, Linear, Roll, engine, plain  # noqa: F401 (a fixture)
from test_kernels import scalars  # noqa: F401 (a fixture)
from torch import Tensor

from nextvid_mcore import rope, switches
from nextvid_mcore.models import carried, fp8_layer, kernels
from nextvid_mcore.models.attention import Frames, PatternAttention, regular_pattern

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu/test_fp8.py")
LOW = [torch.float32, torch.float8_e4m3fn]


def same(found, wanted) -> None:
    """Both directions of what a kernel wrote, and of its reference."""
    low, high = plain(found.rows).float(), wanted.rows.float()
    assert torch.equal(plain(found.columns).float(), low.t())
    torch.testing.assert_close(plain(found.inverse), wanted.inverse)
    if found.rows.dtype == torch.float32:
        torch.testing.assert_close(low, high, rtol=2e-5, atol=1e-3)
    else:  # the interpreter rounds its own way: by a step or two
        assert (low - high).norm() < 0.2 * high.norm()


@interpreted
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("rows", "width"), [(40, 48), (33, 24), (5, 100)])
def test_norm_in_both_directions(monkeypatch, dtype: torch.dtype, rows: int, width: int) -> None:
    from nextvid_mcore.models import triton_fp8 as t

    monkeypatch.setattr(t, "BOTH", {"BR": 16, "BC": 32})
    x, y = torch.randn(2, rows, width) + 30  # far from zero: differences of large sums would show
    bias, weight, shift = torch.randn(3, width)
    for added in ((None, None), (y, bias)):
        most = torch.zeros(2, 1)
        rest = (*added, weight, shift, 1e-5, torch.tensor(100.0))
        total, found, *moments = t.norm_both(x.as_subclass(Cuda), *rest, most[0], dtype)
        wanted_total, wanted, *wanted_moments = t.norm_both(x, *rest, most[1], dtype)
        torch.testing.assert_close(plain(total), wanted_total)
        for a, b in zip(moments, wanted_moments, strict=True):
            torch.testing.assert_close(plain(a), b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(most[0], most[1], rtol=1e-4, atol=1e-4)
        if dtype == torch.float32:
            torch.testing.assert_close(plain(found.rows), wanted.rows, rtol=1e-3, atol=2e-2)
            wanted = type(wanted)(plain(found.rows), plain(found.columns), wanted.inverse)
        same(found, wanted)


@interpreted
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(21, 3, 16), (40, 9, 24), (16, 2, 6)])
def test_rotation_back(monkeypatch, dtype, tokens: int, heads: int, width: int) -> None:
    from nextvid_mcore.models import triton_fp8 as t
    from nextvid_mcore.models import triton_pieces

    monkeypatch.setattr(t, "TURN", {"BT": 16, "HEADS": 4})
    grads = torch.randn(3, tokens, heads, width)
    positions = rope.token_positions(torch.arange(tokens) * 3, 4, 4)
    cos, sin = rope.turns(rope.angles(positions, width))
    most, scale = torch.zeros(2, 1), torch.tensor(100.0)
    found, bias = t.turn_backward([x.as_subclass(Cuda) for x in grads], cos, sin, scale, most[0], dtype)
    wanted, wanted_bias = t.turn_backward(list(grads), cos, sin, scale, most[1], dtype)
    torch.testing.assert_close(most[0], most[1])
    torch.testing.assert_close(plain(bias), wanted_bias)
    same(found, wanted)
    if dtype == torch.float32:
        packed = torch.empty(tokens, heads, 3, width)
        triton_pieces.turn(list(grads), packed, cos, sin, back=True)
        torch.testing.assert_close(wanted.rows, packed.flatten(1) * scale)


@interpreted
@pytest.mark.usefixtures("scalars")
def test_attention_writes_what_the_output_linear_reads(monkeypatch) -> None:
    from nextvid_mcore.models import triton_prefix

    rows, heads, frames, frame, width = 2, 3, 2, 64, 32
    whole = (Frames(0, frames, frame),)
    pattern = regular_pattern(whole, whole, "causal", torch.device("cpu"))
    parts = torch.randn(frames * frame, rows, heads, 3, width, dtype=torch.half).unbind(3)
    core = PatternAttention(None, 1, None, "self", pg_collection=SimpleNamespace(tp=None))
    amax, scale = torch.full((1,), 1e-3), torch.tensor(100.0)
    given = {"attention_bias": pattern, "low": (scale, amax, torch.float8_e4m3fn)}
    wanted = core(*parts, **given)  # not the kernel's: nobody writes FP8
    assert isinstance(wanted, Tensor) and amax == 1e-3
    monkeypatch.setattr(kernels, "choose", lambda q, pattern: kernels.prefix)
    kernels._gluon.cache_clear()
    found = core(*parts, **given)
    kernels._gluon.cache_clear()
    assert found.rows.shape == (len(parts[0]) * rows, heads * width) and found.columns is None
    torch.testing.assert_close(amax[0], wanted.abs().max().float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.inverse, 1 / scale.reshape(1))
    low, high = found.rows.float() * found.inverse, wanted.flatten(0, 1).float()
    assert (low - high).norm() < 0.2 * high.norm()
    exact = triton_prefix.attend_low(
        *(x.permute(1, 2, 0, 3) for x in parts), frame, scale, amax, torch.float32
    )
    torch.testing.assert_close(exact.rows / scale, high, rtol=1e-2, atol=1e-3)


HEADS, WIDTH, ROWS, TOKENS = 2, 32, 3, 8


class Attention:
    """What fp8_layer asks of PatternSelfAttention."""

    num_attention_heads_per_partition, attn_mask_type = HEADS, None

    def __init__(self) -> None:
        self.linear_qkv, self.linear_proj = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.writes, self.wrote = False, 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        assert pattern == "pattern"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)

    def core_attention(self, q, k, v, mask, attn_mask_type, attention_bias, low):
        found = self.attend(q, k, v, attention_bias)
        if not self.writes:
            return found
        self.wrote += 1
        scale, amax, _ = low
        amax.copy_(found.abs().max())
        return SimpleNamespace(rows=found.flatten(0, 1) * scale, columns=None, inverse=1 / scale)


class Layer(carried.Carries, torch.nn.Module):
    def __init__(self, remade: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            layernorm_epsilon=1e-5, recompute_pieces=remade, recompute_granularity=None
        )
        self.self_attention = Attention()
        self.linears = torch.nn.ModuleList((self.self_attention.linear_qkv, self.self_attention.linear_proj))
        self.mlp = torch.nn.Module()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = Linear(WIDTH, 48), Linear(48, WIDTH)
        self.mlp.config = self.config
        self.input_layernorm, self.pre_mlp_layernorm = (torch.nn.LayerNorm(WIDTH) for _ in range(2))
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)

    def plain(self, x: Tensor, angles: Tensor) -> Tensor:
        attention, one, two = self.self_attention, self.mlp.linear_fc1, self.mlp.linear_fc2
        qkv, proj = attention.linear_qkv, attention.linear_proj
        packed = F.linear(self.input_layernorm(x), qkv.weight, qkv.bias)
        q, k, v = packed.unflatten(2, (HEADS, 3, -1)).unbind(3)
        q, k = (rope.rotate(each, angles[:, :, None]) for each in (q, k))
        x = x + F.linear(attention.attend(q, k, v, "pattern"), proj.weight, proj.bias)
        hidden = F.gelu(F.linear(self.pre_mlp_layernorm(x), one.weight, one.bias))
        return x + F.linear(hidden, two.weight, two.bias)


def built(remade: bool = False) -> tuple[list[Layer], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [Layer(remade) for _ in range(3)]
    carried.link(layers)
    positions = rope.token_positions(torch.arange(TOKENS * ROWS).view(TOKENS, ROWS), 4, 4)
    angles = rope.angles(positions, WIDTH // HEADS)
    return layers, torch.randn(TOKENS, ROWS, WIDTH), angles, rope.turns(angles)


@interpreted
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("carry", [False, True])
def test_a_frozen_layer(te: Roll, writes: bool, carry: bool) -> None:
    layers, x, angles, turns = built()
    y = wanted = x
    with torch.no_grad(), switches.changed(carry=carry, attention=writes):
        for layer in layers:
            layer.self_attention.writes = writes
            y = fp8_layer.encoder_layer(layer, y, turns, "pattern")
            assert (layer.behind is not None and layer.behind.added is not None) == (
                carry and layer is not layers[-1]
            )
            before, wanted = wanted, layer.plain(wanted, angles)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    qkv, proj, one = layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1
    assert layer.self_attention.wrote == int(writes) and proj.made[0].seen == 0
    assert one.made[0].seen == qkv.made[0].seen == qkv.open == one.open == proj.open == 0
    most = layer.input_layernorm(before).abs().max().detach()
    torch.testing.assert_close(qkv.made[0].amax[0], most, rtol=1e-5, atol=0)
    assert te.renewed == 0 and te.first


@interpreted
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("remade", [False, True])
def test_a_trained_layer(te: Roll, carry: bool, remade: bool) -> None:
    layers, x, angles, turns = built(remade)
    leaves = [x.requires_grad_(), *(p for layer in layers for p in layer.parameters())]
    y = x
    for layer in layers:
        y = layer.plain(y, angles)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, dy)
    ours = x
    with switches.changed(carry=carry):
        for layer in layers:
            ours = fp8_layer.encoder_layer(layer, ours, turns, "pattern")
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
    qkv, one = layer.self_attention.linear_qkv, layer.mlp.linear_fc1
    for linear in (qkv, one):  # nobody else read them
        assert linear.made[0].seen == 0 and linear.made[0].amax > 0 and linear.made[2].amax == 0
    assert te.renewed == 0
    ours.backward(dy)
    assert te.renewed == 1
    own = {id(layer.self_attention.linear_proj.weight) for layer in layers}  # left to autograd here
    for leaf, grad in zip(leaves, wanted, strict=True):
        buffer = getattr(leaf, "main_grad", None)
        found = leaf.grad if buffer is None or id(leaf) in own else buffer - 1
        torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-3)
    assert qkv.made[2].seen == one.made[2].seen == 0 and qkv.made[2].amax > 0
    torch.testing.assert_close(one.made[0].scale, torch.tensor(SCALE))


def test_what_goes_this_way(monkeypatch) -> None:
    monkeypatch.setattr(fp8_layer.fp8_mlp, "fits", lambda config, x: x == "fits")
    with switches.changed(trained=False):
        assert not fp8_layer.fits(None, "fits")
        with torch.no_grad():
            assert fp8_layer.fits(None, "fits") and not fp8_layer.fits(None, "does not")
    assert fp8_layer.fits(None, "fits") and not fp8_layer.fits(None, "does not")
