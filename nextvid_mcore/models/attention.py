"""Figure 3's attention masks, and the core attention that obeys them.

A pattern is a list of stretches. Tokens attend only inside their stretch (one mask of a clip), and
there by the rule on their frames: `causal`, a token sees its own frame and earlier ones (encoder);
`autoregressive`, a query sees strictly earlier frames (predictor); `isolated`, a token sees its own
frame (the joint predictor's queries among themselves). The decoder needs no pattern: it puts each
frame in a row of its own.

megatron-core hands its `attention_bias` argument down to the core attention untouched, also through
both kinds of recomputation, so the pattern travels there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nextvid_mcore.models import kernels
from nextvid_mcore.models.padded import Padded, Side

if TYPE_CHECKING:
    from nextvid_mcore.models.triton_fp8 import Scaled

Rule = Literal["causal", "autoregressive", "isolated"]
_RULES = {"causal": torch.le, "autoregressive": torch.lt, "isolated": torch.eq}  # key frame to query frame


@dataclass(frozen=True)
class Stretch:
    """Query rows [q_start, q_stop) see key rows [k_start, k_stop) by `rule`, or where `given` says so."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    rule: Rule | None = None
    query_frames: Tensor | None = None  # [rows or 1, queries]
    key_frames: Tensor | None = None  # [rows or 1, keys]
    given: Tensor | None = None  # bool [rows or 1, 1, queries, keys]

    @functools.cached_property
    def allowed(self) -> Tensor:
        """bool [rows or 1, 1, queries, keys]; made when it is first asked for."""
        return (
            self.given if self.rule is None else allowed_pairs(self.query_frames, self.key_frames, self.rule)
        )


@dataclass(frozen=True)
class AttentionPattern:
    """The stretches of a sequence, in order; together they cover every query once.

    blocks: the same for FlexAttention (`flex_blocks`), on CUDA, where one pattern holds for every row.
    padded: the same for one call, where a row holds many stretches of different lengths.
    prefix: tokens of a frame where queries and keys are the same frames, each of which sees itself and all
        before: a prefix of the keys.
    stairs: (first query, first key, frames, queries of a frame, keys of a frame) of each stretch, where its
        i-th frame of queries sees the first i + 1 frames of its keys.
    """

    stretches: tuple[Stretch, ...]
    blocks: BlockMask | None = None
    padded: Padded | None = None
    prefix: int | None = None
    stairs: tuple[tuple[int, int, int, int, int], ...] | None = None


def allowed_pairs(query_frames: Tensor, key_frames: Tensor, rule: Rule) -> Tensor:
    """Which query may see which key, from frame numbers [rows, queries] and [rows, keys].

    Returns bool [rows, 1, queries, keys].
    """
    q, k = query_frames[:, None, :, None], key_frames[:, None, None, :]
    return _RULES[rule](k, q)


def make_pattern(
    query_frames: Sequence[Tensor], key_frames: Sequence[Tensor], key_starts: Sequence[int], rule: Rule
) -> AttentionPattern:
    """Pattern of several stretches laid end to end.

    Args:
        query_frames: per stretch, frame numbers [rows or 1, queries].
        key_frames: per stretch, frame numbers [rows or 1, keys].
        key_starts: per stretch, where its keys begin in the key sequence.
    """
    stretches, start = [], 0
    for q, k, k_start in zip(query_frames, key_frames, key_starts, strict=True):
        stop = start + q.shape[1]
        stretches.append(Stretch(start, stop, k_start, k_start + k.shape[1], rule, q, k))
        start = stop
    return AttentionPattern(tuple(stretches))


def ragged_pattern(
    query_frames: Tensor,
    query_lengths: Sequence[int],
    key_frames: Tensor,
    key_lengths: Sequence[int],
    rule: Rule,
) -> AttentionPattern:
    """Pattern of a single row of stretches of any lengths, laid end to end.

    Args:
        query_frames, key_frames: frame numbers of the row, [1, s].
        query_lengths, key_lengths: of its stretches.
    """
    starts = list(itertools.accumulate(key_lengths, initial=0))[:-1]
    parts = query_frames.split(list(query_lengths), dim=1), key_frames.split(list(key_lengths), dim=1)
    queries, keys = Side.of(query_frames[0], query_lengths), Side.of(key_frames[0], key_lengths)
    allowed = allowed_pairs(queries.frames, keys.frames, rule) & keys.real[:, None, None]
    return dataclasses.replace(make_pattern(*parts, starts, rule), padded=Padded(queries, keys, allowed))


@dataclass(frozen=True)
class Frames:
    """`number` frames from `first` on, of `tokens` tokens each."""

    first: int
    number: int
    tokens: int

    def numbers(self, device: torch.device) -> Tensor:
        """Frame numbers of the tokens, [1, number * tokens]."""
        frames = torch.arange(self.first, self.first + self.number, device=device)
        return frames.repeat_interleave(self.tokens, output_size=self.number * self.tokens)[None]


@functools.cache
def regular_pattern(
    queries: Sequence[Frames], keys: Sequence[Frames], rule: Rule, device: torch.device
) -> AttentionPattern:
    """Pattern of stretches whose frames are whole and the same in every row; keys lie end to end too.

    There are few in a run, and recorded passes read their tensors, so they are kept.
    """
    starts = list(itertools.accumulate((x.number * x.tokens for x in keys), initial=0))[:-1]
    pattern = make_pattern(*([x.numbers(device) for x in part] for part in (queries, keys)), starts, rule)
    if tuple(queries) == tuple(keys) and len(keys) == 1 and rule == "causal":
        pattern = dataclasses.replace(pattern, prefix=keys[0].tokens)
    later = {"causal": 0, "autoregressive": 1}.get(rule)  # than its first keys begin a stretch's queries
    if all(q.first - k.first == later and q.number == k.number for q, k in zip(queries, keys, strict=True)):
        stretches = zip(pattern.stretches, queries, keys, strict=True)
        stairs = tuple((x.q_start, x.k_start, q.number, q.tokens, k.tokens) for x, q, k in stretches)
        pattern = dataclasses.replace(pattern, stairs=stairs)
    if device.type != "cuda":
        return pattern
    return dataclasses.replace(pattern, blocks=kernels.flex_blocks(pattern.stretches))


def make_joint_pattern(context_frames: list[Tensor], query_frames: Tensor) -> AttentionPattern:
    """Pattern of a sequence [context 1 | queries | context 2 | queries | ...] that attends to itself.

    Context is frame-causal among its own; a query of frame t sees its context's frames before t and the
    queries of frame t.

    Args:
        context_frames: per stretch, frame numbers [rows or 1, tokens].
        query_frames: frame numbers [1, queries], the same in every stretch.
    """
    stretches, start = [], 0
    among_queries = allowed_pairs(query_frames, query_frames, "isolated")
    for context in context_frames:
        middle = start + context.shape[1]
        stop = middle + query_frames.shape[1]
        before = allowed_pairs(query_frames, context, "autoregressive")
        allowed = torch.cat([before, among_queries.expand(before.shape[0], -1, -1, -1)], dim=-1)
        stretches.append(Stretch(start, middle, start, middle, "causal", context, context))
        stretches.append(Stretch(middle, stop, start, stop, given=allowed))
        start = stop
    return AttentionPattern(tuple(stretches))


class PatternAttention(MegatronModule):
    """Core attention: softmax(q k / sqrt(d)) v inside each stretch of the pattern, heads split over TP."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: AttentionPattern | None = None,
        packed_seq_params: object | None = None,
        low: tuple[Tensor, Tensor, torch.dtype] | None = None,
    ) -> Tensor | Scaled:
        """Attend.

        Args:
            query, key, value: [s, rows, A local, d].
            attention_bias: the pattern; None lets every query of a row see every key of that row.
            low: scale, largest value and type, where what comes out is wanted in FP8.

        Returns:
            [s, rows, A local * d]; in FP8 if it is wanted and the kernel can write it.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [rows, A, s, d]
        kernel = kernels.choose(q, attention_bias)
        if low is not None and kernel is kernels.prefix:
            return kernels.prefix_low(q, k, v, attention_bias, low)
        out = kernel(q, k, v, attention_bias)
        s, rows = query.shape[:2]
        return out.permute(2, 0, 1, 3).reshape(s, rows, -1)
