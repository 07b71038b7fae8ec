"""What autograd keeps of a layer, counted: the bytes that parallel/memory.py says, and fewer with `pieces`.

Pieces go through torch.compile as on a GPU, without a compiler behind it; kernels in Triton have doubles that
keep the same. In FP8 nothing runs here: tests/unit/test_fp8_mlp.py looks at the MLP.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from nextvid_mcore import recipes, switches
from nextvid_mcore.config import RunConfig, StageConfig, TransformerShape
from nextvid_mcore.models import again, fused, kernels
from nextvid_mcore.parallel.groups import Layout, sequences
from nextvid_mcore.parallel.memory import key_bytes, layer_bytes

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # parity

CLIPS, TAU = 2, 2


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        return F.gelu(x + bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        x, bias = ctx.saved_tensors
        with torch.enable_grad():
            x = (x + bias).detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.gelu(x), x, dy)
        return grad, grad.sum(0)


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, parts: int):
        ctx.save_for_backward(cos, sin)
        return packed.view(len(cos), heads, parts, -1).unbind(2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return torch.stack(grads, 2).flatten(1), None, None, None, None


def norm_backward(dnormed, dpast, x, mean, rstd, weight, linear: bool) -> tuple:
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in (x, weight, torch.zeros_like(weight))]
        normed = F.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], eps=1e-6)
        dx, dweight, dbias = torch.autograd.grad(normed, leaves, dnormed)
    return (dx + dpast, dweight, dbias) + (((dx + dpast).sum(0),) if linear else ())


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, bias, gate, shift, scale, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if y is None else x + gate * (y + bias)
        normed, mean, rstd = torch.native_layer_norm(total, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(total, y, bias, gate, scale, mean, rstd)
        return total, normed * (1 + scale) + shift

    @staticmethod
    def backward(ctx: Any, dpast: torch.Tensor | None, dnormed: torch.Tensor) -> tuple:
        total, y, bias, gate, scale, *_ = ctx.saved_tensors
        with torch.enable_grad():
            x = total.detach().requires_grad_()
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            (dx,) = torch.autograd.grad(normed, x, dnormed * (1 + scale))
        dx = dx if dpast is None else dx + dpast
        dscale, dshift = ((dnormed * each).sum(0, keepdim=True) for each in (normed, 1))
        if y is None:
            return dx, None, None, None, dshift, dscale, None
        dy, dgate = gate * dx, (dx * (y + bias)).sum(0, keepdim=True)
        return dx, dy, dy.sum((0, 1)), dgate, dshift, dscale, None


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    backend = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", backend)
    monkeypatch.setattr(fused, "compiles", lambda x: True)
    doubles = dict(BiasGelu=BiasGelu, Turn=Turn, norm_backward=norm_backward, GatedNorm=GatedNorm)
    stands_for = SimpleNamespace(**doubles, fits=lambda x: True)
    monkeypatch.setattr(fused, "_triton", lambda name="": stands_for)
    monkeypatch.setattr(kernels, "choose", lambda q, pattern: kernels.plain)  # one call, as FlexAttention is
    monkeypatch.setattr(kernels, "plain", lambda q, k, v, _=None: F.scaled_dot_product_attention(q, k, v))
    pieces = [piece for piece in vars(fused).values() if hasattr(piece, "compiled")]
    for piece in pieces:
        piece.compiled.cache_clear()
    with switches.changed(monitors=False):  # they keep nothing
        yield
    for piece in pieces:
        piece.compiled.cache_clear()


def small(recompute: str) -> RunConfig:
    import parity

    shapes = [TransformerShape(width=width, depth=3, heads=2, mlp=4 * width) for width in (96, 64)]
    stage = StageConfig("a", 1, frames=8, batch=CLIPS, lr_start=1e-3, lr_end=1e-3, tau_samples=TAU)
    return parity.small(tuple(shapes), recompute=recompute).altered(
        train={"precision": "bf16", "micro_batch": CLIPS}, stages=(stage,)
    )


def kept(recompute: str) -> tuple[Counter, dict[str, torch.Tensor]]:
    """Bytes kept by the middle layer of each network, and the step's gradients."""
    import parity

    config = small(recompute)
    step, where = parity.built(config), [""]
    for name, module in step.model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: where.append(name))
        module.register_forward_hook(lambda *_: where.pop() and None)
    known = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    alive, found = [], Counter()

    def count(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
            alive.append(x.untyped_storage())  # so that no address comes twice
            known.add(alive[-1].data_ptr())
            if "block.layers.1" in where[-1]:
                found[where[-1].partition(".")[0]] += alive[-1].nbytes()
        return x

    def inner(keep: Any, give: Any) -> Any:  # of hooks only the last counts
        return saved_tensors_hooks(lambda x: count(keep(x)), give)

    point = parity.schedule(config).at(0)
    with mock.patch.object(again, "saved_tensors_hooks", inner), saved_tensors_hooks(count, lambda x: x):
        step.gradients(point, parity.clips(config, point, 0, 1))
    return found, parity.gradients(step)


def test_layers_keep_what_the_plan_says(as_on_a_gpu) -> None:
    grads = {}
    for recompute in ("none", "pieces"):
        config, (found, grads[recompute]) = small(recompute), kept(recompute)
        one, length = Layout(), sequences(config, 8)
        frames = config.model.token_frames(8) - 1
        tokens = {"student": length["student"], "predictor": length["predictor"]}
        tokens["decoder"] = config.mask.masks * frames * config.model.tokens_per_frame * TAU
        for role, number in tokens.items():
            wanted = number * layer_bytes(config, one, role)
            if role == "predictor":
                wanted += length["student"] * key_bytes(config, one, role)
            # beside it a few fp32 numbers a token (norms, heads of attention) and a row's AdaLN vectors
            assert found[role] / (CLIPS * wanted) == pytest.approx(1.03, abs=0.03), (recompute, role)
    for name, grad in grads["none"].items():
        assert grad.abs().max() > 0, name
        assert torch.equal(grad, grads["pieces"][name]), name


def test_by_hand() -> None:
    """ViT-G, bytes a token and layer, D and M wide: 16 D + 4 M in bf16, 15 D + 3 M in `delayed`."""
    config = recipes.get("vit_g")
    d, m, e, one = 1408, 6144, 384, Layout()
    assert layer_bytes(config, one, "student") == 16 * d + 4 * m
    assert layer_bytes(config, one, "decoder") == 36 * e
    assert layer_bytes(config, one, "predictor") == 28 * e and key_bytes(config, one, "predictor") == 4 * e
    pieces = config.altered(parallel={"recompute": "pieces"})
    assert layer_bytes(pieces, one, "student") == 12 * d + 2 * m
    assert layer_bytes(pieces, one, "decoder") == 24 * e
    assert layer_bytes(pieces, one, "predictor") == 16 * e
    for recompute, activated in (("none", 1), ("pieces", 0)):
        fp8 = config.altered(
            fp8={"all": "delayed"}, parallel={"recompute": recompute}, model={"backend": "te"}
        )
        assert layer_bytes(fp8, one, "student") == 15 * d + (2 + activated) * m
        assert layer_bytes(fp8, Layout(tensor=2), "student") == 6 * d + (9 * d + 3 * m) / 2
    full = config.altered(parallel={"recompute": "full"})
    assert layer_bytes(full, Layout(tensor=2, sequence=True), "student") == d
