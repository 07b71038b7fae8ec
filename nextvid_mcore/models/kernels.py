"""The attention kernels, and which of them a pattern gets.

    masked  torch's scaled_dot_product_attention, stretch by stretch with a boolean mask: the reference, for
            any pattern, anywhere.
    prefix  the same where whole frames see themselves and all before and no gradient is wanted, as in the
            reference's passes: kernels of ours (models/gluon_prefix.py and, for other versions of Triton,
            triton_prefix.py). Hopper, half precision.
    stairs  the same for stretches of frames that see themselves or all before, forward and backward: kernels
            of ours (models/gluon_stairs.py or triton_stairs.py). Hopper, half precision.
    flex    FlexAttention, all stretches in one call: no mask in memory, blocks that nobody sees are not
            computed. CUDA, half precision, patterns that hold for every row.
    padded  the stretches of packed masks in one call, padded to the longest (models/padded.py).
    whole   stairs of one step, where every query sees every key. Hopper with this Triton's Gluon.
    plain   scaled_dot_product_attention without a mask, for the same.

torch's own attention is called by models/sdpa.py, without cuDNN.

benchmarks/attention.py and prefix.py compare them; benchmarks/RESULTS.md says what else was tried.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nextvid_mcore.models import fused, padded, sdpa

if TYPE_CHECKING:
    from nextvid_mcore.models.attention import AttentionPattern, Stretch
    from nextvid_mcore.models.triton_fp8 import Scaled

MIN_HEAD = 16  # FlexAttention takes no narrower heads
BLOCK = 128  # tokens; what nobody in a block of so many sees is skipped
HOPPER_BLOCK = 64
SHORTEST = 128  # queries; for fewer FlexAttention is another kernel, made for decoding
# Tiles that inductor's own search found fastest for stretches of 48 to 256 tokens a frame, heads of 64, H100;
# other GPUs get inductor's, since these may not fit their shared memory
HOPPER, HOPPER_TILES = (
    (9, 0),
    {
        "fwd_BLOCK_M": 64,
        "fwd_BLOCK_N": 64,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 32,
        "num_warps": 4,
        "num_stages": 3,
    },
)
PREFIX_TOKENS, PREFIX_HEADS = 64, (32, 64)  # tokens of a frame: a multiple; the widths that were tried
GLUON = "3.6."  # the Triton whose Gluon models/gluon_*.py were tried with: it changes with every version
STAIRS_SHORTEST = 4096  # queries from which on triton_stairs.py is faster than FlexAttention
STAIRS_HEADS = (32, 64)
STAIRS_TOKENS = 16  # of a frame: a multiple. Others ended in an illegal instruction, or now and then in NaN
SPAN = 1 << 16  # frame numbers lie below it


def plain(q: Tensor, k: Tensor, v: Tensor, pattern: None = None) -> Tensor:
    """Every query of a row sees every key of it; all [rows, A, s, d]."""
    return sdpa.attend(q, k, v)


def masked(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """The reference: [rows, A, queries, d] from q of that shape and k, v [rows, A, keys, d]."""
    parts = []
    for x in pattern.stretches:
        keys = slice(x.k_start, x.k_stop)
        queries = q[:, :, x.q_start : x.q_stop]
        parts.append(sdpa.attend(queries, k[:, :, keys], v[:, :, keys], x.allowed))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return fused.compile_(flex_attention)


@functools.cache
def tiles(device: torch.device) -> dict[str, int] | None:
    """FlexAttention's options on `device`; None: inductor's own."""
    return HOPPER_TILES if _hopper(device) else None


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def flex(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """The same as `masked` by FlexAttention; the result has q's strides."""
    return _compiled_flex()(q, k, v, block_mask=pattern.blocks, kernel_options=tiles(q.device))


def prefix(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """The same by our kernels, for patterns that have a `prefix`; no gradient goes through it."""
    return ours("prefix").attend(q, k, v, pattern.prefix)


def prefix_low(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, low: tuple[Tensor, Tensor, torch.dtype]
) -> Scaled:
    """What `prefix` gives, times a scale in FP8, rows [s * rows, A * d]; low: scale, largest value, type."""
    return ours("prefix").attend_low(q, k, v, pattern.prefix, *low)


@functools.cache
def _gluon() -> bool:
    """Whether this Triton's Gluon is the one that our kernels are written in."""
    import triton  # which is not there without a GPU

    return triton.__version__.startswith(GLUON) and not triton.knobs.runtime.interpret


def ours(kind: str) -> ModuleType:
    """The module of our kernels of `prefix` or `stairs` for this Triton."""
    return importlib.import_module(f"nextvid_mcore.models.{'gluon' if _gluon() else 'triton'}_{kind}")


def stairs(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """The same by our kernels, for patterns that have `stairs`."""
    return ours("stairs").attend(q, k, v, pattern.stairs)


def whole(q: Tensor, k: Tensor, v: Tensor, pattern: None = None) -> Tensor:
    """The same as `plain` by the kernels of `stairs`."""
    return ours("stairs").attend(q, k, v, ((0, 0, 1, q.shape[2], k.shape[2]),))


def flex_blocks(stretches: Sequence[Stretch], block: int | None = None) -> BlockMask:
    """FlexAttention's form of stretches that have a rule and the same frames in every row.

    A key is numbered stretch * SPAN + frame; every rule lets a query see one range of these numbers.
    block: tokens of a block; None: what is fastest where the stretches lie.
    """
    keys, low, high = [], [], []
    for i, x in enumerate(stretches):
        q, k = x.query_frames[0], x.key_frames[0]
        keys.append(k + i * SPAN)
        first = q if x.rule == "isolated" else torch.zeros_like(q)
        last = q - 1 if x.rule == "autoregressive" else q
        low.append(first + i * SPAN)
        high.append(last + i * SPAN)
    keys, low, high = (torch.cat(x).int() for x in (keys, low, high))
    block = block or (HOPPER_BLOCK if _hopper(keys.device) else BLOCK)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (low[query] <= keys[key]) & (keys[key] <= high[query])

    return create_block_mask(visible, None, None, len(low), len(keys), device=keys.device, BLOCK_SIZE=block)


def _prefix_fits(q: Tensor, pattern: AttentionPattern) -> bool:
    frame = pattern.prefix
    return frame is not None and not torch.is_grad_enabled() and prefix_takes(frame, q.shape[-1], q.device)


def prefix_takes(frame: int, width: int, device: torch.device) -> bool:
    """Whether `prefix` is for frames of so many tokens and heads of that width."""
    return _hopper(device) and frame % PREFIX_TOKENS == 0 and width in PREFIX_HEADS


def _stairs_fit(q: Tensor, pattern: AttentionPattern | None) -> bool:
    if not _hopper(q.device) or q.shape[-1] not in STAIRS_HEADS:
        return False
    if pattern is None:
        return q.shape[2] >= SHORTEST and q.shape[2] % STAIRS_TOKENS == 0 and _gluon()
    if pattern.stairs is None or any(x % STAIRS_TOKENS for *_, n, m in pattern.stairs for x in (n, m)):
        return False
    return q.shape[2] >= (SHORTEST if _gluon() else STAIRS_SHORTEST)


def choose(q: Tensor, pattern: AttentionPattern | None) -> Callable[..., Tensor]:
    """The kernel for queries [rows, A, s, d]."""
    fast = q.dtype in (torch.bfloat16, torch.float16) and fused.compiles(q)
    if pattern is None:
        return whole if fast and _stairs_fit(q, None) else plain
    if pattern.padded is not None:
        return padded.attend
    if fast and _prefix_fits(q, pattern):
        return prefix
    if fast and _stairs_fit(q, pattern):
        return stairs
    fits = q.shape[-1] >= MIN_HEAD and q.shape[2] >= SHORTEST
    if pattern.blocks is not None and fast and fits:
        return flex
    return masked
