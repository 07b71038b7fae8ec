"""Token sequences: which tokens stand where, at which 3D position, and who may see whom.

A clip's tokens have flat ids in (t, h, w) order. A `Sequence` is what a network needs to know of a
row of them beside their values: cosines and sines of its rotary angles, and the attention pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.masking import ClipMasks
from nextvid_mcore.models.attention import (
    AttentionPattern,
    Frames,
    make_joint_pattern,
    make_pattern,
    ragged_pattern,
    regular_pattern,
)
from nextvid_mcore.rope import angles, token_positions, turns


@dataclass(frozen=True)
class Sequence:
    """Rotary turns [2, s, rows, R / 2] and the pattern of a token sequence."""

    rope: Tensor
    pattern: AttentionPattern


@dataclass(frozen=True)
class CrossSequence:
    """The predictor's: rotary turns of the queries and of the keys, and the pattern between them."""

    query_rope: Tensor
    key_rope: Tensor
    pattern: AttentionPattern
    queries: int  # length of the query sequence


@dataclass(frozen=True)
class JointSequence:
    """The joint predictor's: each stretch's context with its queries behind it, end to end."""

    rope: Tensor  # of the whole sequence, [2, length, rows, R / 2]
    pattern: AttentionPattern
    contexts: tuple[slice, ...]  # where each stretch's context lies in the context sequence
    queries: int  # of one stretch, p * n


def patchify(
    video: Tensor, model: ModelConfig, read: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> Tensor:
    """[B, 3, T, H, W] -> [B, t * n, patch_dim], values of a patch in (c, dt, dy, dx) order.

    read: what is made of the values on the way, [B, t, h, w, 3, dt, dy, dx] as they lie in `video`.
    """
    patches = rearrange(
        video,
        "b c (t dt) (h dy) (w dx) -> b t h w c dt dy dx",
        dt=model.tubelet_size,
        dy=model.patch_size,
        dx=model.patch_size,
    )
    return read(patches).flatten(4).flatten(1, 3)


def visible_patches(patches: Tensor, masks: ClipMasks) -> Tensor:
    """The patches the student sees: [B, t * n, patch_dim] -> [s, rows, patch_dim]."""
    tokens = masks.tokens.to(patches.device)
    if tokens.shape[0] == patches.shape[0] and not _packed(masks):
        picked = patches.gather(1, tokens[:, :, None].expand(-1, -1, patches.shape[-1]))
    else:  # one row that holds all clips' masks end to end
        clips, lengths = torch.tensor([(x.clips, x.length) for x in masks.segments]).T
        picked = patches[clips.repeat_interleave(lengths).to(patches.device), tokens[0]][None]
    return picked.transpose(0, 1).contiguous()


def _packed(masks: ClipMasks) -> bool:
    return isinstance(masks.segments[0].clips, int)


def _rope(tokens: Tensor, model: ModelConfig, head_width: int) -> Tensor:
    """tokens [rows, s] -> turns [2, s, rows, R / 2]."""
    positions = token_positions(tokens.T, model.grid, model.grid)
    return turns(angles(positions, head_width, model.rope_base))


def full_sequence(model: ModelConfig, token_frames: int, rows: int, device: torch.device) -> Sequence:
    """Every token of a clip, frame-wise causal: what the reference encoder sees."""
    n = model.tokens_per_frame
    tokens = torch.arange(token_frames * n, device=device).expand(rows, -1)
    frames = (Frames(0, token_frames, n),)
    return Sequence(
        _rope(tokens, model, model.encoder.head_width), regular_pattern(frames, frames, "causal", device)
    )


def student_sequence(model: ModelConfig, masks: ClipMasks, device: torch.device) -> Sequence:
    """The visible tokens of every mask, each mask frame-wise causal in its own stretch."""
    tokens = masks.tokens.to(device)
    rope = _rope(tokens, model, model.encoder.head_width)
    if masks.counts:
        frames = _regular(masks)
        return Sequence(rope, regular_pattern(frames, frames, "causal", device))
    if _packed(masks):
        frames, lengths = tokens // model.tokens_per_frame, [x.length for x in masks.segments]
        return Sequence(rope, ragged_pattern(frames, lengths, frames, lengths, "causal"))
    frames = [_frames(model, tokens, masks, i) for i in range(len(masks.segments))]
    return Sequence(rope, make_pattern(frames, frames, [x.start for x in masks.segments], "causal"))


def predictor_sequence(
    model: ModelConfig, masks: ClipMasks, token_frames: int, device: torch.device
) -> CrossSequence | JointSequence:
    """A query at every position of frames 1 .. t-1 for every stretch of context.

    The query sequence is the stretches' p * n queries end to end, in the order of `masks.segments`; in a
    joint sequence each stretch's context stands before its queries.
    """
    n, stretches = model.tokens_per_frame, len(masks.segments)
    tokens = masks.tokens.to(device)
    targets = torch.arange(n, token_frames * n, device=device)[None]
    if model.context == "joint":
        return _joint_sequence(model, masks, tokens, targets)
    if masks.counts:
        queries = (Frames(1, token_frames - 1, n),) * stretches
        pattern = regular_pattern(queries, _regular(masks), "autoregressive", device)
    elif _packed(masks):
        pattern = ragged_pattern(
            (targets // n).repeat(1, stretches),
            [targets.shape[1]] * stretches,
            tokens // n,
            [x.length for x in masks.segments],
            "autoregressive",
        )
    else:
        pattern = make_pattern(
            [targets // n] * stretches,
            [_frames(model, tokens, masks, i) for i in range(stretches)],
            [x.start for x in masks.segments],
            "autoregressive",
        )
    return CrossSequence(
        query_rope=_rope(targets.repeat(len(tokens), stretches), model, model.predictor.head_width),
        key_rope=_rope(tokens, model, model.predictor.head_width),
        pattern=pattern,
        queries=stretches * targets.shape[1],
    )


def _joint_sequence(model: ModelConfig, masks: ClipMasks, tokens: Tensor, targets: Tensor) -> JointSequence:
    """tokens: visible ids [rows, s]; targets: ids [1, p * n] of the queries of one stretch."""
    contexts = tuple(slice(x.start, x.stop) for x in masks.segments)
    queries = targets.expand(tokens.shape[0], -1)
    joined = torch.cat([part for place in contexts for part in (tokens[:, place], queries)], dim=1)
    frames = [_frames(model, tokens, masks, i) for i in range(len(contexts))]
    return JointSequence(
        rope=_rope(joined, model, model.predictor.head_width),
        pattern=make_joint_pattern(frames, targets // model.tokens_per_frame),
        contexts=contexts,
        queries=targets.shape[1],
    )


def _regular(masks: ClipMasks) -> tuple[Frames, ...]:
    """The stretches of static masks, which keep the same number in every frame of every clip."""
    return tuple(Frames(0, x.length // masks.counts[x.mask], masks.counts[x.mask]) for x in masks.segments)


def _frames(model: ModelConfig, tokens: Tensor, masks: ClipMasks, stretch: int) -> Tensor:
    """Frame numbers of a stretch's tokens, [rows or 1, length]; 1 where every row has the same."""
    segment = masks.segments[stretch]
    frames = tokens[:, segment.start : segment.stop] // model.tokens_per_frame
    return frames[:1] if masks.counts else frames


def by_mask(z: Tensor, masks: ClipMasks, predicted_frames: int, clips: int) -> Tensor:
    """The predictor's output [stretches * p * n, rows, E] as [n, M, p, B, E]."""
    if not _packed(masks):
        return rearrange(z, "(m p n) b e -> n m p b e", m=len(masks.segments), p=predicted_frames)
    return rearrange(
        z, "(b m p n) 1 e -> n m p b e", b=clips, m=len(masks.segments) // clips, p=predicted_frames
    )
