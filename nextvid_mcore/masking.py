"""Block masks: which tokens of a clip the student sees (Section 3.4, mask part of Table 8).

Mask m covers a frame with `blocks[m]` rectangles of `scale[m]` of its area, all of one shape, and
hides their union in every frame (tubes). With Table 8's numbers 0.380 and 0.190 of a frame stay
visible on average. How clips with different counts share a micro-batch is the mode:

    fixed     draw again until at least `keep[m]` is visible, then drop a random subset to that count.
              Nothing is ever added: a lone visible patch inside a block is no block masking.
    packed    whatever the blocks leave; all masks of all clips in one ragged row.
    truncate  V-JEPA 2's: whatever the blocks leave, every clip cut at the smallest count of the
              micro-batch. It empties the last frames and depends on the micro-batch: parity only.
    none      no masking (Table 4): one mask, M = 1, that leaves everything visible.

A mask is a pure function of (seed, index), whatever the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nextvid_mcore import rng
from nextvid_mcore.config import MaskConfig, require

TRIES = 8  # draws made at once; part of what a key means, so changing it changes every mask
ROUNDS = 250  # of TRIES draws, then the settings cannot be met


@dataclass(frozen=True)
class MaskSegment:
    """A stretch of `ClipMasks.tokens` that holds one mask, of every clip (slice) or of one (int)."""

    mask: int
    clips: slice | int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def rows(self) -> slice:
        """Rows of `ClipMasks.tokens` that the segment covers."""
        return self.clips if isinstance(self.clips, slice) else slice(0, 1)


@dataclass(frozen=True)
class ClipMasks:
    """Visible tokens of a micro-batch.

    tokens: int64 [rows, s], flat (t, h, w) ids in the clip's grid; inside a segment they rise, so
    they are ordered (frame, position). rows = B for fixed and truncate, 1 for packed, whose segments are
    ordered (clip, mask).
    counts: visible tokens v of a frame under each mask where that is static, else empty.
    """

    tokens: Tensor
    segments: tuple[MaskSegment, ...]
    counts: tuple[int, ...]
    clips: int  # B
    tokens_per_frame: int  # n

    @property
    def frames(self) -> Tensor:
        """Frame of every token, int64 [rows, s]."""
        return self.tokens // self.tokens_per_frame

    def of(self, segment: MaskSegment) -> Tensor:
        """The tokens of a segment: int64 [B or 1, length]."""
        return self.tokens[segment.rows, segment.start : segment.stop]


def draw_visible(mask: MaskConfig, grid: int, seed: int, index: int) -> list[np.ndarray]:
    """Visible positions (0 .. n-1, rising) of a frame under each of the M masks of sample `index`."""
    visible, keep, counts = _draw(mask, grid, seed, [index])
    return [np.flatnonzero(plane[0]) for plane in _final(visible, keep, counts)]


def draw_masks(
    mask: MaskConfig, grid: int, token_frames: int, seed: int, indices: Sequence[int]
) -> ClipMasks:
    """Masks of the clips with global sample indices `indices` over their first `token_frames` frames.

    grid: token rows and columns of a frame. The student never sees a clip's last token frame, so
    callers pass t - 1.
    """
    require(token_frames >= 1, f"masks need at least 1 token frame, got {token_frames}")
    require(len(indices) >= 1, "masks of an empty micro-batch were asked for")
    n = grid * grid
    visible, keep, counts = _draw(mask, grid, seed, indices)
    planes = _final(visible, keep, counts)  # M times bool [B, n]
    if mask.mode == "packed":
        per_mask = [[np.flatnonzero(row) for row in plane] for plane in planes]
        order = [(clip, m) for clip in range(len(indices)) for m in range(len(planes))]
        pieces = [_tubes(per_mask[m][clip][None], token_frames, n) for clip, m in order]
        owners: list[tuple[slice | int, int]] = list(order)
    else:
        pieces = []
        for plane in planes:
            if mask.static:
                pieces.append(_tubes(np.nonzero(plane)[1].reshape(len(indices), -1), token_frames, n))
            else:
                rows = [_tubes(np.flatnonzero(row)[None], token_frames, n) for row in plane]
                shortest = min(row.shape[1] for row in rows)
                pieces.append(np.concatenate([row[:, :shortest] for row in rows]))
        owners = [(slice(0, len(indices)), m) for m in range(len(planes))]
    segments, start = [], 0
    for (clips, m), piece in zip(owners, pieces, strict=True):
        segments.append(MaskSegment(mask=m, clips=clips, start=start, length=piece.shape[1]))
        start += piece.shape[1]
    return ClipMasks(
        tokens=torch.from_numpy(np.concatenate(pieces, axis=1)),
        segments=tuple(segments),
        counts=counts,
        clips=len(indices),
        tokens_per_frame=n,
    )


@cache
def mean_shares(mask: MaskConfig, grid: int) -> tuple[float, ...]:
    """Share of a frame that each mask's blocks leave visible on average, before any fixed count: the
    mean of 4096 draws of seed 0 (standard error below 0.002)."""
    if mask.mode == "none":
        return (1.0,)
    visible, _, _ = _draw(replace(mask, mode="packed"), grid, 0, range(4096))
    return tuple(visible.mean((1, 2)).tolist())


def _tubes(places: np.ndarray, token_frames: int, n: int) -> np.ndarray:
    """Positions of a frame [rows, v] -> the same in every frame, flat ids [rows, token_frames * v]."""
    frames = np.arange(token_frames, dtype=np.int64)[None, :, None] * n
    return (frames + places[:, None, :]).reshape(places.shape[0], -1)


def _final(visible: np.ndarray, priority: np.ndarray, counts: tuple[int, ...]) -> list[np.ndarray]:
    """What is kept of what the blocks leave, M times bool [B, n]: all of it, or exactly the count."""
    if not counts:
        return list(visible)
    kept = []
    for plane, ranks, count in zip(visible, priority, counts, strict=True):
        chosen = np.argsort(np.where(plane, ranks, 2.0), axis=1, kind="stable")[:, :count]
        exact = np.zeros_like(plane)
        np.put_along_axis(exact, chosen, True, axis=1)
        kept.append(exact)
    return kept


def _draw(
    mask: MaskConfig, grid: int, seed: int, indices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Blocks of every clip, drawn until enough is visible.

    Returns what the blocks leave visible, bool [M, B, n]; priorities in [0, 1) by which the surplus is
    dropped, [M, B, n]; and the counts v of the static modes (else empty).
    """
    n, clips = grid * grid, len(indices)
    counts = mask.counts(n) if mask.static else ()
    if mask.mode == "none":
        return np.ones((1, clips, n), dtype=bool), np.zeros((1, clips, n)), counts
    visible = np.empty((len(mask.blocks), clips, n), dtype=bool)
    priority = np.empty((len(mask.blocks), clips, n))
    for m, blocks in enumerate(mask.blocks):
        least = counts[m] if counts else 1
        open_clips = np.arange(clips)
        for attempt in range(ROUNDS):
            # One generator per (index, mask, round): TRIES draws of the blocks, then the priorities.
            keys = ((int(indices[b]), m, attempt) for b in open_clips)
            size = 3 * TRIES * blocks + n
            numbers = np.stack([each.random(size) for each in rng.numpy_rngs(seed, "mask", keys)])
            draws = numbers[:, :-n].reshape(-1, TRIES, 3, blocks)
            left = ~_covered(draws, grid, mask.scale[m], mask.aspect)  # [open, TRIES, n]
            enough = left.sum(-1) >= least
            first = enough.argmax(-1)
            done = enough.any(-1)
            visible[m, open_clips[done]] = left[done, first[done]]
            priority[m, open_clips[done]] = numbers[done, -n:]
            open_clips = open_clips[~done]
            if not len(open_clips):
                break
        require(
            not len(open_clips),
            f"{blocks} mask blocks of scale {mask.scale[m]} never left {least} of {n} tokens visible in "
            f"{ROUNDS * TRIES} draws; lower the mask's keep, blocks or scale",
        )
    return visible, priority, counts


def _covered(draws: np.ndarray, grid: int, scale: float, aspect: tuple[float, float]) -> np.ndarray:
    """Union of blocks: uniform numbers [clips, tries, 3, blocks] -> bool [clips, tries, n].

    The three rows are aspect (its first entry: all blocks of a draw share one shape), top and left.
    """
    area = int(scale * grid * grid)
    ratio = aspect[0] + draws[:, :, 0, :1] * (aspect[1] - aspect[0])
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, grid)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, grid)
    top = np.floor(draws[:, :, 1] * (grid - height + 1))[..., None]
    left = np.floor(draws[:, :, 2] * (grid - width + 1))[..., None]
    line = np.arange(grid)
    rows = (line >= top) & (line < top + height[..., None])  # [clips, tries, blocks, grid]
    columns = (line >= left) & (line < left + width[..., None])
    hit = np.matmul(rows.swapaxes(-1, -2).astype(np.float32), columns.astype(np.float32)) > 0
    return hit.reshape(*hit.shape[:2], -1)
