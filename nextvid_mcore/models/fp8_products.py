"""Products of Transformer Engine's linears called one by one, with `delayed` scales.

A linear of Transformer Engine quantises its input and its output's gradient itself. Where something of ours
has written these in FP8 already, in one direction or both, the products are called here, with the linear's
own quantisers, scales, weights and their quantised copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INPUT, WEIGHT, GRADIENT = 0, 1, 5  # of the six quantisers of Transformer Engine's Linear


def opened(linear: Any, x: Tensor, trained: bool) -> tuple:
    """The linear's quantisers, made and entered in the roll as its own forward pass with `x` does."""
    linear.prepare_forward(x, allow_non_contiguous=True)  # which it would copy
    quantizers = linear._get_quantizers(False, False, trained)
    linear.end_forward()
    return quantizers


def weight(linear: Any, quantizers: tuple, trained: bool) -> Any:
    """The linear's quantised weight; kept between micro-batches as its own forward pass keeps it."""
    from transformer_engine.pytorch.module.base import quantize_weight

    first = None if linear.disable_parameter_transpose_cache else linear.is_first_microbatch
    linear.is_first_microbatch = False
    quantizers[WEIGHT].set_usage(rowwise=True, columnwise=trained)
    low, new = quantize_weight(
        tensor=linear.weight,
        quantizer=quantizers[WEIGHT],
        workspace=None if first is None else linear._fp8_workspaces.get("weight"),
        update_workspace=first is None or first,
        workspace_dtype=linear.weight.dtype,
        cache=first is not None,
    )
    if new is not None:
        linear._fp8_workspaces["weight"] = new
    return low


def for_backward(linear: Any, low_weight: Any, *inputs: Any) -> None:
    """Drop the direction that the forward pass has read, of a weight where nobody else keeps it."""
    for each in (*inputs, low_weight) if linear.disable_parameter_transpose_cache else inputs:
        each.update_usage(rowwise_usage=False, columnwise_usage=True)


def weight_gradient(linear: Any, x: Any, dy: Any) -> Tensor | None:
    """Add dy^T x to the fp32 buffer; what autograd gets is nothing, or what tells it to call its hooks."""
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    weight = linear.weight
    if not weight.requires_grad:
        return None
    product(x, dy, weight.main_grad.dtype, layout="NT", grad=True, out=weight.main_grad, accumulate=True)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype)


def product(a: Any, b: Any, dtype: torch.dtype, **how: Any) -> Tensor:
    """b a^T, with layout NN b a, with NT b^T a; gradients are added up in fp32 within the product."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    return general_gemm(a, b, out_dtype=dtype, use_split_accumulator="layout" in how, **how)[0]


def torch_dtype(quantizer: Any) -> torch.dtype:
    """Of the values that `quantizer` makes."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[quantizer.dtype]


def as_te(scaled: Any, quantizer: Any, dtype: torch.dtype) -> Any:
    """As Transformer Engine's products take it."""
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    rows, columns = scaled.rows, scaled.columns
    return Float8TensorStorage(
        data=None if rows is None else rows.view(torch.uint8),
        fp8_scale_inv=scaled.inverse,
        fp8_dtype=quantizer.dtype,
        fake_dtype=dtype,
        data_transpose=None if columns is None else columns.view(torch.uint8),
        quantizer=quantizer,
    )
