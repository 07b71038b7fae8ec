"""Whether every matrix that a role multiplies in FP8 has sides that FP8 kernels take.

Rows are the tokens of a micro-batch on a rank, columns the widths of a rank's share. cuBLAS wants
multiples of 16 (MXFP8: of 32) on both, because the weight gradient sums over the rows. `blockwise` wants no
more: Transformer Engine 2.20 pads the last block of 128 (`Float8BlockQuantizer.get_scale_shape`), and
networks 64 wide ran (tests/gpu/test_fp8.py). Where a rank's share of tokens or width is no multiple of 128,
sequence parallelism gathers its activations in bf16 and quantises them then; Transformer Engine warns of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from nextvid_mcore.config import RunConfig, require
from nextvid_mcore.parallel.groups import Layout, sequences
from nextvid_mcore.parallel.placement import Placement, Seat


def check_fp8(config: RunConfig, placement: Placement) -> None:
    """Raise ConfigError, naming role and numbers, where FP8 cannot be."""
    for seat in placement.seats:
        for role in seat.roles:
            recipe = config.fp8.of(role)
            idle = role == "reference" and not (config.model.align or config.eval.knn_every)
            if recipe == "none" or idle:
                continue
            unit = 32 if recipe == "mxfp8" else 16
            _check_widths(config, role, recipe, seat.layout, unit)
            for where, name, tokens, clips in _tokens(config, placement, seat, role):
                shares = seat.layout.tensor if seat.layout.sequence else 1
                _check_tokens(f"fp8 {role} {recipe}, {where}", name, tokens // shares, clips, unit)


def _check_widths(config: RunConfig, role: str, recipe: str, layout: Layout, unit: int) -> None:
    shape = config.model.shape(role)
    for name, width in (("width", shape.width), ("MLP width", shape.mlp)):
        share = width / layout.tensor
        require(
            share % unit == 0,
            f"fp8 {role} {recipe}: {name} {width} over tensor parallel {layout.tensor} is {share:g} on a "
            f"rank, which is no multiple of {unit}; change one of them or use --fp8.{role} none",
        )
    depth = shape.depth // layout.pipeline if role in ("student", "reference") else shape.depth
    for name in ("bf16_first", "bf16_last"):
        layers = getattr(config.fp8, name)
        require(
            layers <= depth,
            f"fp8 {name} {layers} is more than the {role}'s {depth} layers (of a pipeline stage); choose at "
            f"most {depth}",
        )


def _tokens(
    config: RunConfig, placement: Placement, seat: Seat, role: str
) -> Iterator[tuple[str, str, int, int]]:
    """(where, what, tokens of a clip, clips) of every sequence that `role`'s linears read."""
    passes = [
        (
            f"stage {stage.name}",
            stage.frames,
            stage.tau_samples,
            placement.clips(seat, config.micro_batch(stage)),
        )
        for stage in config.stages
    ]
    if config.eval.every:
        whole, rest = config.eval.batch, config.eval.samples % config.eval.batch
        for size in {min(whole, config.eval.samples), rest or whole}:
            clips = max(1, placement.clips(seat, size))
            passes.append(("the held-out loss", config.stages[0].frames, config.eval.tau_bins, clips))
    for where, frames, samples, clips in passes:
        t, n = config.model.token_frames(frames), config.model.tokens_per_frame
        length = {"reference": t * n} | sequences(config, frames)  # without alignment an online kNN asks it
        # every predicted frame of every mask and tau sample is a row of the decoder's
        rows = config.mask.masks * (t - 1) * samples
        yield where, role, length[role] * (rows if role == "decoder" else 1), clips
        if role == "predictor" and config.model.context == "isolated":
            yield where, "student", length["student"], clips


def _check_tokens(where: str, name: str, tokens: int, clips: int, unit: int) -> None:
    """tokens: of a clip on a rank, whose share it quantises under sequence parallelism."""
    require(
        tokens * clips % unit == 0,
        f"{where}: {clips} clip{'s' if clips != 1 else ''} of {tokens} {name} tokens on a rank make "
        f"{tokens * clips}, no multiple of {unit}; use a micro-batch (in the held-out loss: eval batch and "
        f"samples) that is a multiple of {unit // math.gcd(tokens, unit)}",
    )
