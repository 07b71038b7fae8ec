"""The kernels that write FP8, run once and every value compared before a run starts.

A compiler is part of them: ptxas 12.8 made wrong bytes of one form of their code (benchmarks/RESULTS.md),
which no loss shows in a few steps. What is compiled here is what the run takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextvid_mcore import switches
from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig
from nextvid_mcore.models import again, fp8_mlp, kernels
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
    trained = "student" in used and switches.on("trained")
    if "student" in used or "reference" in used:
        x, y, weight = whole(ROWS, encoder.width), whole(ROWS, encoder.width), drawn(encoder.width)
        for added in ((None, None), (y, whole(encoder.width))):
            given = (x, *added, weight, weight)
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
    if "reference" in used and switches.on("attention") and kernels.prefix_takes(frame, width, device):
        packed = drawn(2 * frame, 2, encoder.heads, 3, width).to(device)
        parts = [x.permute(1, 2, 0, 3) for x in packed.unbind(3)]
        pattern = AttentionPattern((), prefix=frame)
        low = kernels.prefix_low(*parts, pattern, (*_at(device, _scale()), e4m3))
        high = kernels.prefix(*parts, pattern).permute(2, 0, 1, 3).reshape(low.rows.shape).float()
        yield "the kernel of attention over prefixes", low, (high * SCALE).cpu()


def _scale() -> tuple[Tensor, Tensor]:
    """A scale, and the largest value so far."""
    return torch.tensor(SCALE), torch.zeros(1)


def _at(place: torch.device, given: tuple) -> list:
    return [x if x is None else x.to(place) for x in given]
