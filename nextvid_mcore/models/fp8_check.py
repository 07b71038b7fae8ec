"""The kernels that write FP8, run once and compared byte by byte before a run starts.

A compiler is part of them: ptxas 12.8 made wrong bytes of one form of their code (benchmarks/RESULTS.md),
which no loss shows in a few steps. What is compiled here is what the run takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig
from nextvid_mcore.models import fp8_layer, fp8_mlp, kernels
from nextvid_mcore.models.attention import AttentionPattern
from nextvid_mcore.rope import angles, turns

ROWS, SCALE = 256, 50.0


def check(config: RunConfig, device: torch.device) -> None:
    """Where `delayed` goes through kernels that write FP8, compare all that they write at the run's widths.

    Raises:
        ConfigError: they write something else than they should.
    """
    roles = [role for role, recipe in config.fp8.used.items() if recipe == "delayed"]
    if not roles or not fp8_mlp.on():
        return
    gradient = torch.float8_e5m2 if config.fp8.format == "hybrid" else torch.float8_e4m3fn
    for name, found, wanted in _written(config.model, roles, device, gradient):
        rows, high = found.rows.cpu().float(), wanted.rows.cpu().float()
        wrong = ((rows - high).abs() > 0.3 * high.abs() + 0.05).sum()
        if found.columns is not None:
            wrong += (found.columns.cpu().float() != rows.t()).sum()
        if wrong:
            import triton

            where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
            raise ConfigError(
                f"fp8 delayed: {name} writes {wrong} of {rows.numel()} values wrong on {where} with Triton "
                f"{triton.__version__}; use --no-fp8.fused (slower), or the Triton of constraints.txt"
            )


def _written(
    model: ModelConfig, roles: list[str], device: torch.device, gradient: torch.dtype
) -> Iterator[tuple[str, Any, Any]]:
    """Name of a kernel, what it wrote on `device`, and its reference on the CPU."""
    from nextvid_mcore.models import triton_fp8 as t

    e4m3, generator = torch.float8_e4m3fn, torch.Generator().manual_seed(0)

    def whole(*size: int) -> Tensor:
        """Small whole numbers: their sums are exact in bf16."""
        return torch.randint(-8, 9, size, generator=generator).bfloat16()

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    def both(run: Callable, *given: Tensor) -> list:
        return [run(*_at(place, given), *_at(place, _scale())) for place in (device, torch.device("cpu"))]

    for width in sorted({model.shape(role).mlp for role in roles}):
        x, bias = drawn(ROWS, width), drawn(width)
        yield f"GELU's kernel {width} wide", *both(lambda *a: t.gelu(*a, e4m3, True), x, bias)
        back = both(lambda *a: t.gelu_backward(*a, gradient)[0], x, x, bias)
        yield f"the kernel of GELU's derivative {width} wide", *back
    encoder = model.encoder
    trained = "student" in roles and fp8_layer.on("trained")
    if trained or "reference" in roles:
        x, y, weight = whole(ROWS, encoder.width), whole(ROWS, encoder.width), drawn(encoder.width)
        for added in ((None, None), (y, whole(encoder.width))):
            given = (x, *added, weight, weight)
            if "reference" in roles:
                made = both(lambda *a: t.norm(*a[:5], model.norm_eps, *a[5:], e4m3)[1], *given)
                yield f"the norm's kernel {encoder.width} wide", *made
            if trained:
                made = both(lambda *a: t.norm_both(*a[:5], model.norm_eps, *a[5:], e4m3)[1], *given)
                yield f"the norm's kernel {encoder.width} wide in both directions", *made
    if trained:
        cos, sin = turns(angles(torch.randint(0, 16, (ROWS, 3), generator=generator), encoder.head_width))
        grads = [drawn(ROWS, encoder.heads, encoder.head_width) for _ in range(3)]
        made = both(lambda *a: t.turn_backward(a[:3], *a[3:], gradient)[0], *grads, cos, sin)
        yield f"the kernel of rotation's derivative, {encoder.heads} heads", *made
    frame, width = model.tokens_per_frame, encoder.head_width
    if "reference" in roles and fp8_layer.on("attention") and kernels.prefix_takes(frame, width, device):
        packed = drawn(2 * frame, 2, encoder.heads, 3, width).to(device)
        parts = [x.permute(1, 2, 0, 3) for x in packed.unbind(3)]
        pattern = AttentionPattern((), prefix=frame)
        low = kernels.prefix_low(*parts, pattern, (*_at(device, _scale()), e4m3))
        high = kernels.prefix(*parts, pattern).permute(2, 0, 1, 3).reshape(low.rows.shape).float()
        yield "the kernel of attention over prefixes", low, t.Scaled(high * SCALE, None, low.inverse)


def _scale() -> tuple[Tensor, Tensor]:
    """A scale, and the largest value so far."""
    return torch.tensor(SCALE), torch.zeros(1)


def _at(place: torch.device, given: tuple) -> list:
    return [x if x is None else x.to(place) for x in given]
