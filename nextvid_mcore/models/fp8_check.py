"""The kernels that write FP8, run once and every value compared before a run starts.

A compiler is part of them: ptxas 12.8 made wrong bytes of one form of their code (benchmarks/RESULTS.md),
which no loss shows in a few steps. What is compiled here is what the run takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig
from nextvid_mcore.models import again, fp8_layer, fp8_mlp, kernels
from nextvid_mcore.models.attention import AttentionPattern
from nextvid_mcore.rope import angles, turns

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nextvid_mcore.models.triton_fp8 import Scaled

ROWS, SCALE = 256, 50.0


def check(config: RunConfig, networks: Mapping[str, TransformerConfig], device: torch.device) -> None:
    """Compare all that the kernels write that `networks` (by role) call, at their widths.

    Raises:
        ConfigError: they write something else than they should.
    """
    used = {role: network for role, network in networks.items() if fp8_mlp.meant(network)}
    gradient = torch.float8_e5m2 if config.fp8.format == "hybrid" else torch.float8_e4m3fn
    for name, found, wanted in _written(config.model, used, device, gradient):
        if wrong := _wrong(found, wanted):
            import triton

            where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
            raise ConfigError(
                f"fp8 delayed: {name} writes {wrong} of {wanted.numel()} values wrong on {where} with Triton "
                f"{triton.__version__}; use --no-fp8.fused (slower), or the Triton of constraints.txt"
            )


def _wrong(found: Scaled, wanted: Tensor) -> int:
    """Values that are far from the `wanted` [N, W], in either direction, or that differ between the two."""
    columns = None if found.columns is None else found.columns.t()
    first, *more = (x.cpu().float() for x in (found.rows, columns) if x is not None)
    wrong = ((first - wanted).abs() > 0.3 * wanted.abs() + 0.05).sum()
    return int(wrong + sum((other != first).sum() for other in more))


def _written(
    model: ModelConfig, used: Mapping[str, TransformerConfig], device: torch.device, gradient: torch.dtype
) -> Iterator[tuple[str, Scaled, Tensor]]:
    """Name of a kernel, what it wrote on `device`, and the values [N, W] of the reference on the CPU."""
    if not used:
        return
    from nextvid_mcore.models import triton_fp8 as t

    e4m3, generator = torch.float8_e4m3fn, torch.Generator().manual_seed(0)

    def whole(*size: int) -> Tensor:
        """Small whole numbers: their sums are exact in bf16."""
        return torch.randint(-8, 9, size, generator=generator).bfloat16()

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    def both(run: Callable, *given: Tensor) -> tuple[Scaled, Tensor]:
        found, right = (run(*_at(x, given), *_at(x, _scale())) for x in (device, torch.device("cpu")))
        return found, (right.columns.t() if right.rows is None else right.rows).float()

    widths: dict[int, bool] = {}  # with gradients?
    for role in used:
        width = model.shape(role).mlp
        widths[width] = widths.get(width, False) or role != "reference"
    remade = any(map(again.wanted, used.values()))
    for width, learns in sorted(widths.items()):
        x, bias = drawn(ROWS, width), drawn(width)
        ways = {"": (False, True)}  # columns, rows; without gradients
        if learns:
            ways |= {" for its gradient": (True, False)} if remade else {" in both directions": (True, True)}
        for way, (columns, rows) in ways.items():
            made = both(lambda *a, c=columns, r=rows: t.gelu(*a, e4m3, c, r), x, bias)
            yield f"GELU's kernel {width} wide{way}", *made
        if learns:
            back = both(lambda *a: t.gelu_backward(*a, gradient)[0], x, x, bias)
            yield f"the kernel of GELU's derivative {width} wide", *back
    encoder = model.encoder
    trained = "student" in used and fp8_layer.on("trained")
    reads = "predictor" in used and fp8_layer.on("predictor") and model.context == "isolated"
    decodes = "decoder" in used and fp8_layer.on("decoder") and model.condition == "concat"
    normed: dict[int, bool] = {}  # widths; in both directions?
    if "student" in used or "reference" in used:
        normed[encoder.width] = trained
    if reads:
        normed[model.predictor.width] = True
    for width, in_both in normed.items():
        x, y, weight = whole(ROWS, width), whole(ROWS, width), drawn(width)
        for added in ((None, None), (y, whole(width))):
            given = (x, *added, weight, weight)
            made = both(lambda *a: t.norm(*a[:5], model.norm_eps, *a[5:], e4m3)[1], *given)
            yield f"the norm's kernel {width} wide", *made
            if in_both:
                made = both(lambda *a: t.norm_both(*a[:5], model.norm_eps, *a[5:], e4m3)[1], *given)
                yield f"the norm's kernel {width} wide in both directions", *made
    turning = [(encoder, 3)] * trained + [(model.predictor, 1), (model.predictor, 2)] * reads
    for shape, parts in turning + [(model.decoder, 3)] * decodes:
        cos, sin = turns(angles(torch.randint(0, 16, (ROWS, 3), generator=generator), shape.head_width))
        grads = [drawn(ROWS, shape.heads, shape.head_width) for _ in range(parts)]
        made = both(lambda *a, n=parts: t.turn_backward(a[:n], *a[n:], gradient)[0], *grads, cos, sin)
        yield f"the kernel of rotation's derivative, {parts} x {shape.heads} heads", *made
    if decodes:
        yield from _adaln(model.decoder.width, model.norm_eps, whole, drawn, both, gradient)
    frame, width = model.tokens_per_frame, encoder.head_width
    if "reference" in used and fp8_layer.on("attention") and kernels.prefix_takes(frame, width, device):
        packed = drawn(2 * frame, 2, encoder.heads, 3, width).to(device)
        parts = [x.permute(1, 2, 0, 3) for x in packed.unbind(3)]
        pattern = AttentionPattern((), prefix=frame)
        low = kernels.prefix_low(*parts, pattern, (*_at(device, _scale()), e4m3))
        high = kernels.prefix(*parts, pattern).permute(2, 0, 1, 3).reshape(low.rows.shape).float()
        yield "the kernel of attention over prefixes", low, (high * SCALE).cpu()


def _adaln(
    width: int, eps: float, whole: Callable, drawn: Callable, both: Callable, gradient: torch.dtype
) -> Iterator[tuple[str, Scaled, Tensor]]:
    """What `_written` has of AdaLN's norms and gates."""
    from nextvid_mcore.models import triton_adaln as t

    if width > t.WIDEST:
        return
    size, row = (ROWS // 4, 4, width), (1, 4, width)
    x, y, bias, gate = whole(*size), whole(*size), whole(width), whole(*row)
    shift, scale = drawn(*row), drawn(*row)

    def normed(*given: Tensor) -> Scaled:
        return t.forward(*given[:6], eps, t.Quantum(*given[6:], torch.float8_e4m3fn))[1]

    def gated(*given: Tensor) -> Scaled:
        return t.backward(*given[:9], t.Quantum(*given[9:], gradient))[1]

    yield f"the kernel of AdaLN's norm, {width} wide", *both(normed, x, y, bias, gate, shift, scale)
    _, mean, rstd = torch.native_layer_norm(x.float(), (width,), None, None, eps)
    given = drawn(*size), drawn(*size), x, y, bias, gate, scale, mean.flatten(), rstd.flatten()
    yield f"the kernel of AdaLN's gradient, {width} wide", *both(gated, *given)


def _scale() -> tuple[Tensor, Tensor]:
    """A scale, and the largest value so far."""
    return torch.tensor(SCALE), torch.zeros(1)


def _at(place: torch.device, given: tuple) -> list:
    return [x if x is None else x.to(place) for x in given]
