"""The MLP whose GELU quantises: its kernels in Triton's interpreter, and its products by doubles of
Transformer Engine's that keep fp32; tests/gpu/test_fp8.py compares the real ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.models import fp8_mlp

SCALE = 8.0  # a power of two: nothing is rounded


class Cuda(torch.Tensor):
    is_cuda = property(lambda self: True)


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(torch.Tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled then: tests/gpu/test_fp8.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "width"), [(40, 48), (33, 16)])
def test_kernels_are_what_they_stand_for(monkeypatch, dtype: torch.dtype, rows: int, width: int) -> None:
    from nextvid_mcore.models import triton_fp8 as t

    for name in ("TILE", "FLAT"):
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
        torch.testing.assert_close(most[2], most[3])
        torch.testing.assert_close(plain(sums), wanted_sums)
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
                torch.testing.assert_close(low, high, rtol=2e-5, atol=1e-4)
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


@pytest.mark.parametrize("kernel", [None, "gelu", "gelu_backward"])
def test_kernels_are_checked_before_a_run(monkeypatch, kernel: str | None) -> None:
    """Half of the transposed copy's bytes wrong, as a compiler once made them."""
    from nextvid_mcore.models import triton_fp8

    if kernel is not None:
        right = getattr(triton_fp8, kernel)

        def wrong(*args: object) -> object:
            found = right(*args)
            low = found[0] if isinstance(found, tuple) else found
            low.columns.view(torch.uint8)[::2] = 0x60
            return found

        monkeypatch.setattr(triton_fp8, kernel, wrong)
    config = recipes.get("tiny").altered(
        model={"backend": "te"},
        train={"precision": "bf16"},
        fp8={"student": "delayed", "decoder": "delayed"},
    )
    fp8_mlp.use(True)
    if kernel is None:
        fp8_mlp.check(config, torch.device("cpu"))
        return
    with pytest.raises(ConfigError, match=r"values wrong on .* use --no-fp8\.fused"):
        fp8_mlp.check(config, torch.device("cpu"))
    fp8_mlp.check(config.altered(fp8={"student": "current", "decoder": "none"}), torch.device("cpu"))
    fp8_mlp.use(False)
    fp8_mlp.check(config, torch.device("cpu"))
    fp8_mlp.use(True)


@dataclass
class Low:
    """Stands for Transformer Engine's FP8 tensor: fp32 values times a scale, in one or both directions."""

    data: Tensor | None
    data_transpose: Tensor | None
    fp8_scale_inv: Tensor
    fp8_dtype: str = "fp32"
    fake_dtype: torch.dtype | None = None
    quantizer: object = None

    _data = property(lambda self: self.data.view(torch.float32))
    _scale_inv = property(lambda self: self.fp8_scale_inv)
    _fp8_dtype = property(lambda self: self.fp8_dtype)
    _quantizer = property(lambda self: self.quantizer)

    def update_usage(self, rowwise_usage: bool, columnwise_usage: bool) -> None:
        self.data = self.data if rowwise_usage else None
        self.data_transpose = self.data_transpose if columnwise_usage else None

    def rows(self) -> Tensor:
        return self.data.view(torch.float32) * self.fp8_scale_inv

    def columns(self) -> Tensor:
        return self.data_transpose.view(torch.float32) * self.fp8_scale_inv


class Quantizer:
    dtype = "fp32"

    def __init__(self) -> None:
        self.scale, self.amax, self.seen = torch.tensor(SCALE), torch.zeros(1), 0

    def set_usage(self, rowwise: bool, columnwise: bool) -> None:
        assert rowwise
        self.both = columnwise

    def __call__(self, x: Tensor) -> Low:
        self.seen += 1
        self.amax.copy_(x.abs().max())
        y = x.detach() * self.scale
        return Low(y, y.t().contiguous() if self.both else None, 1 / self.scale)


class Linear(torch.nn.Module):
    """What fp8_mlp asks of Transformer Engine's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = torch.nn.Parameter(torch.randn(outputs))
        self.weight.main_grad = torch.ones(outputs, inputs)
        self.weight.grad_added_to_main_grad = False
        self.is_first_microbatch, self.disable_parameter_transpose_cache = True, False
        self._fp8_workspaces: dict[str, Low] = {}
        self.made = [Quantizer() for _ in range(3)]
        self.open = 0

    def prepare_forward(self, x: Tensor) -> Tensor:
        self.open += 1
        return x.contiguous()

    def end_forward(self) -> None:
        self.open -= 1

    def _get_quantizers(self, fp8_output: bool, fp8_grad: bool, grad: bool) -> tuple:
        given, weight, gradient = self.made
        return given, weight, None, None, None, gradient if grad else None


def general_gemm(a, b, out_dtype, use_split_accumulator, layout="TN", grad=False, out=None, accumulate=False):
    assert use_split_accumulator == grad
    one = a.rows() if layout[0] == "T" else a.columns()
    two = b.columns() if layout[1] == "T" else b.rows()
    y = two @ one.t()
    if out is not None:
        assert accumulate
        out.add_(y)
    return y.to(out_dtype), None, None, None


def quantize_weight(tensor, quantizer, workspace, update_workspace, workspace_dtype, cache):
    if workspace is not None:
        assert not update_workspace
        return workspace, None
    made = quantizer(tensor)
    return made, made if cache else None


@pytest.fixture
def te(monkeypatch) -> None:
    root = "transformer_engine.pytorch"
    for name, contents in (
        ("module.base", {"quantize_weight": quantize_weight, "get_dummy_wgrad": lambda s, d: torch.empty(s)}),
        ("cpp_extensions", {"general_gemm": general_gemm}),
        ("constants", {"TE_DType_To_Torch": {"fp32": torch.float32}}),
        ("tensor.storage.float8_tensor_storage", {"Float8TensorStorage": Low}),
    ):
        module = ModuleType(f"{root}.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("cached", [True, False])
def test_products_and_gradients(te, monkeypatch, cached: bool, remade: bool) -> None:
    torch.manual_seed(0)
    one, two = Linear(16, 48), Linear(48, 16)
    one.disable_parameter_transpose_cache = two.disable_parameter_transpose_cache = not cached
    weights = []
    monkeypatch.setattr(
        fp8_mlp, "_weight", lambda *a, made=fp8_mlp._weight: weights.append(made(*a)) or weights[-1]
    )
    module = SimpleNamespace(linear_fc1=one, linear_fc2=two, config=SimpleNamespace(recompute_pieces=remade))
    x = torch.randn(5, 8, 16, requires_grad=True)
    wanted = F.linear(F.gelu(F.linear(x, one.weight, one.bias)), two.weight)
    dy = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (x, one.weight, one.bias, two.weight), dy)
    found = []
    for _ in range(2):  # the second micro-batch takes the first one's weights
        y, bias = fp8_mlp.mlp(module, x)
        (low_x, _, low_a, _), told = y.grad_fn.next_functions[0][0].low, two.made[0].amax.clone()
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
    torch.testing.assert_close(y, F.linear(F.gelu(F.linear(x, one.weight, one.bias)), two.weight))
    assert not (one.made[0].both or two.made[1].both) and two.made[1].seen == 2 and not two._fp8_workspaces


def test_a_frozen_layer(te, monkeypatch) -> None:
    from nextvid_mcore.models import fp8_frozen

    def float8_tensor(shape, dtype, data, device, **rest) -> Low:
        assert data.shape[:-1] == shape[:-1] and dtype == torch.float32
        return Low(data, None, **rest)

    module = ModuleType("transformer_engine.pytorch.tensor.float8_tensor")
    module.Float8Tensor = float8_tensor
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    one, two, qkv = Linear(16, 48), Linear(48, 16), Linear(16, 16)
    norms = [torch.nn.LayerNorm(16) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)

    class Attention:
        linear_qkv = qkv

        def __call__(self, low, rotary_pos_emb, attention_bias):
            assert (rotary_pos_emb, attention_bias) == ("rope", "pattern")
            return low.rows() @ qkv.weight.t(), qkv.bias

    layer = SimpleNamespace(
        config=SimpleNamespace(layernorm_epsilon=1e-5),
        input_layernorm=norms[0],
        pre_mlp_layernorm=norms[1],
        self_attention=Attention(),
        mlp=SimpleNamespace(linear_fc1=one, linear_fc2=two, config=None),
    )
    x = torch.randn(5, 8, 16)
    with torch.no_grad():
        found = fp8_frozen.encoder_layer(layer, x, "rope", "pattern")
        y = x + F.linear(norms[0](x), qkv.weight, qkv.bias)
        hidden = F.gelu(F.linear(norms[1](y), one.weight, one.bias))
        wanted = y + F.linear(hidden, two.weight, two.bias)
    torch.testing.assert_close(found, wanted)
    assert one.made[0].seen == qkv.made[0].seen == 0 and qkv.open == 0
    torch.testing.assert_close(qkv.made[0].amax[0], norms[0](x).abs().max().detach())
    torch.testing.assert_close(one.made[0].amax[0], norms[1](y).abs().max().detach())


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
