"""Doubles of what Transformer Engine gives to models/fp8_*.py, which keep fp32: it is not there on a CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

SCALE = 8.0  # a power of two: nothing is rounded


class Cuda(torch.Tensor):
    is_cuda = property(lambda self: True)


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(torch.Tensor)


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its own pass, which is not what these tests are about."""
        return x @ self.weight.t(), self.bias

    def prepare_forward(self, x: Tensor, allow_non_contiguous: bool) -> Tensor:
        assert allow_non_contiguous or x.is_contiguous()  # nobody wants the copy
        self.open += 1
        return x.contiguous()

    def end_forward(self) -> None:
        self.open -= 1

    def _get_quantizers(self, fp8_output: bool, fp8_grad: bool, grad: bool) -> tuple:
        given, weight, gradient = self.made
        return given, weight, None, None, None, gradient if grad else None


def general_gemm(
    a, b, out_dtype, use_split_accumulator, layout="TN", grad=False, out=None, accumulate=False, bias=None
):
    assert use_split_accumulator == grad
    one = a.rows() if layout[0] == "T" else a.columns()
    two = b.columns() if layout[1] == "T" else b.rows()
    y = two @ one.t()
    y = y if bias is None else y + bias
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


class Roll:
    """FP8GlobalStateManager: whether a pass's first linear has come, and how often scales were renewed."""

    def __init__(self) -> None:
        self.first, self.renewed = True, 0

    def is_first_fp8_module(self) -> bool:
        first, self.first = self.first, False
        return first

    def reduce_and_update_fp8_tensors(self, forward: bool) -> None:
        assert not forward
        self.renewed += 1


@pytest.fixture(name="te")
def engine(monkeypatch) -> Roll:
    root, roll = "transformer_engine.pytorch", Roll()
    for name, contents in (
        ("module.base", {"quantize_weight": quantize_weight, "get_dummy_wgrad": lambda s, d: torch.empty(s)}),
        ("cpp_extensions", {"general_gemm": general_gemm}),
        ("constants", {"TE_DType_To_Torch": {"fp32": torch.float32}}),
        ("tensor.storage.float8_tensor_storage", {"Float8TensorStorage": Low}),
        ("quantization", {"FP8GlobalStateManager": roll}),
    ):
        module = ModuleType(f"{root}.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return roll
