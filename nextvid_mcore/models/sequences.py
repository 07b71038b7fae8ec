"""Token sequences: which tokens stand where, at which 3D position, and who may see whom.

A clip's tokens have flat ids in (t, h, w) order. A `Sequence` is what a network needs to know of a
row of them beside their values: the rotary angles and the attention pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.masking import ClipMasks
from nextvid_mcore.models.attention import AttentionPattern, make_joint_pattern, make_pattern
from nextvid_mcore.rope import angles, token_positions


@dataclass(frozen=True)
class Sequence:
    """Rotary angles [s, rows or 1, 1, R] and the pattern of a token sequence."""

    angles: Tensor
    pattern: AttentionPattern


@dataclass(frozen=True)
class CrossSequence:
    """The predictor's: angles of the queries and of the keys, and the pattern between them."""

    query_angles: Tensor
    key_angles: Tensor
    pattern: AttentionPattern
    queries: int  # length of the query sequence


@dataclass(frozen=True)
class JointSequence:
    """The joint predictor's: each stretch's context with its queries behind it, end to end."""

    angles: Tensor  # of the whole sequence, [length, rows or 1, 1, R]
    pattern: AttentionPattern
    contexts: tuple[slice, ...]  # where each stretch's context lies in the context sequence
    queries: int  # of one stretch, p * n


def patchify(video: Tensor, model: ModelConfig) -> Tensor:
    """[B, 3, T, H, W] -> [B, t * n, patch_dim], values of a patch in (c, dt, dy, dx) order."""
    return rearrange(
        video,
        "b c (t dt) (h dy) (w dx) -> b (t h w) (c dt dy dx)",
        dt=model.tubelet_size,
        dy=model.patch_size,
        dx=model.patch_size,
    )


def visible_patches(patches: Tensor, masks: ClipMasks) -> Tensor:
    """The patches the student sees: [B, t * n, patch_dim] -> [s, rows, patch_dim]."""
    tokens = masks.tokens.to(patches.device)
    if tokens.shape[0] == patches.shape[0] and not _packed(masks):
        picked = patches.gather(1, tokens[:, :, None].expand(-1, -1, patches.shape[-1]))
    else:  # one row that holds all clips' masks end to end
        clip = torch.cat([torch.full((x.length,), x.clips) for x in masks.segments])
        picked = patches[clip.to(patches.device), tokens[0]][None]
    return picked.transpose(0, 1).contiguous()


def _packed(masks: ClipMasks) -> bool:
    return isinstance(masks.segments[0].clips, int)


def _rope(tokens: Tensor, model: ModelConfig, head_width: int) -> Tensor:
    """tokens [rows, s] -> angles [s, rows, 1, R]."""
    positions = token_positions(tokens, model.grid, model.grid)
    return angles(positions, head_width, model.rope_base).transpose(0, 1)[:, :, None]


def full_sequence(model: ModelConfig, token_frames: int, device: torch.device) -> Sequence:
    """Every token of a clip, frame-wise causal: what the reference encoder sees."""
    tokens = torch.arange(token_frames * model.tokens_per_frame, device=device)[None]
    frames = tokens // model.tokens_per_frame
    return Sequence(
        _rope(tokens, model, model.encoder.head_width),
        make_pattern([frames], [frames], [0], "causal"),
    )


def student_sequence(model: ModelConfig, masks: ClipMasks, device: torch.device) -> Sequence:
    """The visible tokens of every mask, each mask frame-wise causal in its own stretch."""
    tokens = masks.tokens.to(device)
    frames = [_frames(model, tokens, masks, i) for i in range(len(masks.segments))]
    starts = [x.start for x in masks.segments]
    return Sequence(
        _rope(tokens, model, model.encoder.head_width), make_pattern(frames, frames, starts, "causal")
    )


def predictor_sequence(
    model: ModelConfig, masks: ClipMasks, token_frames: int, device: torch.device
) -> CrossSequence | JointSequence:
    """A query at every position of frames 1 .. t-1 for every stretch of context.

    The query sequence is the stretches' p * n queries end to end, in the order of `masks.segments`; in a
    joint sequence each stretch's context stands before its queries.
    """
    n = model.tokens_per_frame
    tokens = masks.tokens.to(device)
    targets = torch.arange(n, token_frames * n, device=device)[None]
    stretches = len(masks.segments)
    if model.context == "joint":
        return _joint_sequence(model, masks, tokens, targets)
    return CrossSequence(
        query_angles=_rope(targets.repeat(1, stretches), model, model.predictor.head_width),
        key_angles=_rope(tokens, model, model.predictor.head_width),
        pattern=make_pattern(
            [targets // n] * stretches,
            [_frames(model, tokens, masks, i) for i in range(stretches)],
            [x.start for x in masks.segments],
            "autoregressive",
        ),
        queries=stretches * targets.shape[1],
    )


def _joint_sequence(model: ModelConfig, masks: ClipMasks, tokens: Tensor, targets: Tensor) -> JointSequence:
    """tokens: visible ids [rows, s]; targets: ids [1, p * n] of the queries of one stretch."""
    contexts = tuple(slice(x.start, x.stop) for x in masks.segments)
    queries = targets.expand(tokens.shape[0], -1)
    joined = torch.cat([part for place in contexts for part in (tokens[:, place], queries)], dim=1)
    frames = [_frames(model, tokens, masks, i) for i in range(len(contexts))]
    return JointSequence(
        angles=_rope(joined, model, model.predictor.head_width),
        pattern=make_joint_pattern(frames, targets // model.tokens_per_frame),
        contexts=contexts,
        queries=targets.shape[1],
    )


def _frames(model: ModelConfig, tokens: Tensor, masks: ClipMasks, stretch: int) -> Tensor:
    """Frame numbers of a stretch's tokens, [rows or 1, length]; 1 where every row has the same."""
    segment = masks.segments[stretch]
    frames = tokens[:, segment.start : segment.start + segment.length] // model.tokens_per_frame
    # static masks keep the same number in every frame of every clip
    return frames[:1] if masks.counts else frames


def by_mask(z: Tensor, masks: ClipMasks, predicted_frames: int, clips: int) -> Tensor:
    """The predictor's output [stretches * p * n, rows, E] as [n, M, p, B, E]."""
    if not _packed(masks):
        return rearrange(z, "(m p n) b e -> n m p b e", m=len(masks.segments), p=predicted_frames)
    order = sorted(
        range(len(masks.segments)), key=lambda i: (masks.segments[i].mask, masks.segments[i].clips)
    )
    z = rearrange(z, "(j p n) 1 e -> j p n e", j=len(order), p=predicted_frames)[order]
    return rearrange(z, "(m b) p n e -> n m p b e", b=clips)
