"""FlashAttention-4 (Dao-AILab's package flash-attn-4, written in the CuTe DSL) over a pattern's spans.

Every query sees one range of keys, so the mask is two numbers a query; blocks that nobody sees are left out,
blocks that everybody sees are not masked. Compiled at first use, some seconds a head width and direction.
Where the package is missing, FlexAttention does the same (`kernels.choose`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

if TYPE_CHECKING:
    from nextvid_mcore.models.attention import AttentionPattern, Span

BLOCK = 128  # tokens: its backward pass takes these tiles for heads of up to 64, and no others
OLDEST = (9, 0)  # Hopper: the first GPU whose kernels skip blocks in both directions


@functools.cache
def installed() -> bool:
    """Whether the package is there; one that is there and can't be imported is an error."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def available(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST and installed()


@dataclass(frozen=True)
class Ranges:
    """The keys [low, high) of each query, int32 [queries], and the blocks of that mask."""

    low: Tensor
    high: Tensor
    blocks: BlockMask


def key_ranges(spans: Sequence[Span], device: torch.device, block: int | tuple[int, int] = BLOCK) -> Ranges:
    """Ranges of spans that cover the queries in order."""
    count = torch.tensor([x.q_stop - x.q_start for x in spans], device=device)
    low, high = (
        torch.tensor(ends, device=device, dtype=torch.int32).repeat_interleave(count)
        for ends in ([x.k_start for x in spans], [x.k_stop for x in spans])
    )

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (low[query] <= key) & (key < high[query])

    keys = max(x.k_stop for x in spans)
    blocks = create_block_mask(visible, None, None, len(low), keys, device=device, BLOCK_SIZE=block)
    return Ranges(low, high, blocks)


@functools.cache
def _in_range() -> Callable:
    """The mask as the CuTe DSL compiles it: indices and result are vectors of one element."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def in_range(row, head, query, key, lengths, ends):  # noqa: ANN001, ANN202 (types of the DSL)
        low = scalar_to_ssa(ends[0][query[0]], cutlass.Int32)
        high = scalar_to_ssa(ends[1][query[0]], cutlass.Int32)
        return (low <= key) & (key < high)

    return in_range


def _mask(ranges: Ranges | None, by_key: bool) -> dict:
    """The package's arguments; its backward pass wants each key block's query blocks."""
    if ranges is None:
        return {}
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    x = ranges.blocks
    if by_key:
        parts = (x.q_num_blocks, x.q_indices, x.full_q_num_blocks, x.full_q_indices)
    else:
        parts = (x.kv_num_blocks, x.kv_indices, x.full_kv_num_blocks, x.full_kv_indices)
    return {
        "mask_mod": _in_range(),
        "aux_tensors": [ranges.low, ranges.high],
        "block_sparse_tensors": BlockSparseTensorsTorch(*parts, block_size=x.BLOCK_SIZE),
    }


class _Attend(torch.autograd.Function):
    """[rows, s, A, d] in and out. The package's own function allots the result with other strides."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges | None, options: dict) -> Tensor:  # noqa: ANN001
        from flash_attn.cute.interface import _flash_attn_fwd

        out = torch.empty_like(q)
        needed = any(ctx.needs_input_grad)
        lse = _flash_attn_fwd(q, k, v, out=out, return_lse=needed, **_mask(ranges, False), **options)[1]
        if needed:
            ctx.save_for_backward(q, k, v, out, lse)
        ctx.ranges = ranges
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = ctx.saved_tensors
        grads = _flash_attn_bwd(q, k, v, out, grad, lse, **_mask(ctx.ranges, True))
        return *grads, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges | None = None, **options: object) -> Tensor:
    """softmax(q k / sqrt(d)) v, all [rows, A, s, d]; the result has q's strides. None: no mask."""
    return _Attend.apply(*(x.transpose(1, 2) for x in (q, k, v)), ranges, options).transpose(1, 2)


def flash4(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern | None) -> Tensor:
    """The same as `kernels.masked`, or `kernels.plain` without a pattern."""
    return attend(q, k, v, None if pattern is None else pattern.ranges)
