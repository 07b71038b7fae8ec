"""The MLP in FP8 with `delayed` scales: GELU writes the second linear's input, its derivative the first's
gradient.

The two linears are Transformer Engine's, with their quantisers, scales, weights and their copies; their
products are called here, since a linear of Transformer Engine takes an input that is already quantised, but
not a gradient: it would lose the copy in the other direction. Everything else (other recipes, tensor
parallelism, recomputed layers, `model.compile` off) takes the linears as they are: `FusedMLP`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.models import again

if TYPE_CHECKING:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_config import TransformerConfig

INPUT, WEIGHT, GRADIENT = 0, 1, 5  # of the six quantisers of Transformer Engine's Linear
_state = {"on": True}


def use(on: bool) -> None:
    """Whether MLPs that can go this way do so from now on."""
    _state["on"] = on


def fits(config: TransformerConfig, x: Tensor) -> bool:
    """Whether an MLP of `config` goes this way with the input `x`."""
    return (
        _state["on"]
        and config.fp8 is not None
        and config.fp8_recipe == "delayed"
        and config.tensor_model_parallel_size == 1
        and config.recompute_granularity != "full"
        and x.is_cuda
    )


def check(config: RunConfig, device: torch.device) -> None:
    """Where MLPs go this way, run the kernels once at each of their widths and compare all that they write.

    A compiler is part of them: ptxas 12.8 made wrong bytes of one form of their code (benchmarks/RESULTS.md),
    which no loss shows in a few steps. What is compiled here is what the run takes.

    Raises:
        ConfigError: they write something else than they should.
    """
    roles = [role for role, recipe in config.fp8.used.items() if recipe == "delayed"]
    if not roles or not _state["on"]:
        return
    from nextvid_mcore.models import triton_fp8

    widths = {config.model.shape(role).mlp for role in roles}
    rows, generator = 256, torch.Generator().manual_seed(0)
    gradient = torch.float8_e5m2 if config.fp8.format == "hybrid" else torch.float8_e4m3fn
    for width in sorted(widths):
        given = [torch.randn(*size, generator=generator).bfloat16() for size in ((rows, width), (width,))]
        found = []
        for place in (device, torch.device("cpu")):
            x, bias = (each.to(place) for each in given)
            amax = torch.zeros(2, 1, device=place)
            scale = torch.tensor(50.0, device=place)
            out = triton_fp8.gelu(x, bias, scale, amax[0], torch.float8_e4m3fn, True)
            back, _ = triton_fp8.gelu_backward(x, x, bias, scale, amax[1], gradient)
            found.append([each.cpu().float() for y in (out, back) for each in (y.rows, y.columns)])
        for low, transposed, wanted in ((*found[0][:2], found[1][0]), (*found[0][2:], found[1][2])):
            wrong = ((low - wanted).abs() > 0.3 * wanted.abs() + 0.05).sum() + (transposed != low.t()).sum()
            if wrong:
                import triton

                name = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
                raise ConfigError(
                    f"fp8 delayed: GELU's kernel {width} wide writes {wrong} of {2 * low.numel()} values "
                    f"wrong on {name} with Triton {triton.__version__}; use --no-fp8.fused (slower), or "
                    "the Triton of constraints.txt"
                )


def mlp(module: MLP, x: Tensor, low: Any | None = None) -> tuple[Tensor, Tensor]:
    """Linear, bias and exact GELU, linear: x [s, rows, D] -> the same shape, and the bias [D] that is still
    to be added. low: where no gradient is wanted, x as it was quantised before; then x gives its shape.
    """
    one, two = module.linear_fc1, module.linear_fc2
    flat = x.flatten(0, 1)
    flat = one.prepare_forward(flat)  # makes the quantisers and enters them in the roll, as its own pass does
    two.prepare_forward(flat)
    trained, remade = torch.is_grad_enabled(), again.wanted(module.config)
    y = _Mlp.apply(flat, one.weight, one.bias, two.weight, one, two, trained, low, remade)
    two.end_forward()
    one.end_forward()
    return y.view(x.shape), two.bias


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        one: Any,
        two: Any,
        trained: bool,
        low: Any,
        remade: bool,
    ) -> Tensor:
        """x [N, D] -> [N, D]; in `trained` passes all is quantised in both directions.

        remade: GELU's is so in the backward pass, with the scale it had.
        """
        from nextvid_mcore.models import triton_fp8

        first, second = (linear._get_quantizers(False, False, trained) for linear in (one, two))
        first[INPUT].set_usage(rowwise=True, columnwise=trained)
        low_x = first[INPUT](x) if low is None else low
        low_w1, low_w2 = _weight(one, first, trained), _weight(two, second, trained)
        h = _product(low_w1, low_x, x.dtype)
        to, both = second[INPUT], trained and not remade
        low_a = as_te(triton_fp8.gelu(h, b1, to.scale, to.amax, torch_dtype(to), both), to, x.dtype)
        y = _product(low_w2, low_a, x.dtype)
        if trained:
            weights = zip((one, two), (low_w1, low_w2), strict=True)
            mine = [w for linear, w in weights if linear.disable_parameter_transpose_cache]
            for each in (low_x, low_a, *mine) if both else (low_x, *mine):  # as the backward pass reads them
                each.update_usage(rowwise_usage=False, columnwise_usage=True)
            ctx.save_for_backward(h, b1)
            ctx.low, ctx.linears = (low_x, low_w1, low_a if both else None, low_w2), (one, two)
            ctx.remade = None if both else (to, to.scale.clone())
            ctx.gradients = first[GRADIENT], second[GRADIENT]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from nextvid_mcore.models import triton_fp8

        h, b1 = ctx.saved_tensors
        (low_x, low_w1, low_a, low_w2), (one, two), (to, of) = ctx.low, ctx.linears, ctx.gradients
        ctx.low = None
        of.set_usage(rowwise=True, columnwise=True)
        low_dy = of(dy.contiguous())
        if low_a is None:
            given, scale = ctx.remade
            seen = torch.zeros_like(given.amax)  # it has been told
            low_a = triton_fp8.gelu(h, b1, scale, seen, torch_dtype(given), columns=True, rows=False)
            low_a = as_te(low_a, given, h.dtype)
        dw2 = _weight_gradient(two, low_a, low_dy)
        del low_a
        da = _product(low_w2, low_dy, h.dtype, layout="NN", grad=True)
        del low_dy
        scaled, db1 = triton_fp8.gelu_backward(da, h, b1, to.scale, to.amax, torch_dtype(to))
        low_dh = as_te(scaled, to, h.dtype)
        dx = _product(low_w1, low_dh, h.dtype, layout="NN", grad=True)
        return dx, _weight_gradient(one, low_x, low_dh), db1, dw2, None, None, None, None, None


def _weight(linear: Any, quantizers: tuple, trained: bool) -> Any:
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


def _weight_gradient(linear: Any, x: Any, dy: Any) -> Tensor | None:
    """Add dy^T x to the fp32 buffer; what autograd gets is nothing, or what tells it to call its hooks."""
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    weight = linear.weight
    if not weight.requires_grad:
        return None
    _product(x, dy, weight.main_grad.dtype, layout="NT", grad=True, out=weight.main_grad, accumulate=True)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype)


def _product(a: Any, b: Any, dtype: torch.dtype, **how: Any) -> Tensor:
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
