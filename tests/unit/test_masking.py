"""masking.py: Table 8's shares, exact counts that are subsets, tubes, purity, and the three modes."""

import math

import numpy as np
import pytest
import torch

from nextvid_mcore import masking, rng
from nextvid_mcore.config import ConfigError, MaskConfig

FIXED = MaskConfig()
PACKED = MaskConfig(mode="packed")
TRUNCATE = MaskConfig(mode="truncate")
GOLDEN_FIRST = [0, 4, 6, 7, 12, 13, 14, 15, 19, 20, 46, 47, 51, 52, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63]
GOLDEN_SECOND = [1, 2, 3, 4, 5, 7, 8, 15, 24, 40, 48, 55]
TINY = (8, 3, 0, range(6))  # grid, token frames, seed, indices


def blocks_leave(mask: MaskConfig, grid: int, index: int, m: int, seed: int = 0) -> np.ndarray:
    """What the accepted draw's blocks leave of a frame, bool [n]."""
    return masking._draw(mask, grid, seed, [index])[0][m, 0]


def test_mean_visible_share_is_the_papers():
    """Table 8's blocks leave 0.380 and 0.190 of a frame before the fixed count."""
    assert masking.mean_shares(FIXED, 16) == pytest.approx((0.380, 0.190), abs=0.004)
    drawn = [masking.draw_visible(PACKED, 16, 5, index) for index in range(800)]  # and what is handed out
    shares = [np.mean([len(places[m]) for places in drawn]) / 256 for m in range(2)]
    assert shares == pytest.approx((0.380, 0.190), abs=0.015)


def test_one_block_is_a_rectangle_of_its_scale_and_aspect():
    one = MaskConfig(mode="packed", blocks=(1,), scale=(0.15,), keep=(0.5,))
    shapes, corners = set(), set()
    for index in range(300):
        hidden = ~blocks_leave(one, 16, index, 0).reshape(16, 16)
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        assert hidden.sum() == len(rows) * len(columns), "not a rectangle"
        assert hidden[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        shapes.add((len(rows), len(columns)))
        corners.add((rows[0], columns[0]))
    assert shapes == {(5, 7), (6, 7), (6, 6), (7, 6), (7, 5), (8, 5)} & shapes and len(shapes) >= 4
    for h, w in shapes:
        assert 0.85 * 38 <= h * w <= 1.15 * 38 and 0.7 <= h / w <= 1.65
    assert len(corners) > 60 and {r for r, _ in corners} >= set(range(9))


@pytest.mark.parametrize("grid, counts", [(16, (96, 48)), (8, (24, 12))])
def test_fixed_keeps_exactly_the_count_and_only_what_the_blocks_leave(grid, counts):
    dropped = 0
    for index in range(40):
        kept = masking.draw_visible(FIXED, grid, 0, index)
        assert tuple(len(v) for v in kept) == counts
        for m, places in enumerate(kept):
            left = blocks_leave(FIXED, grid, index, m)
            assert places.dtype == np.int64 and (np.diff(places) > 0).all()
            assert left[places].all(), "a hidden position was added"
            dropped += left.sum() - len(places)
    assert dropped > 0, "nothing was ever dropped, so the subset was never tested"


def test_the_dropped_subset_is_random_over_positions():
    """Every position of what is left is dropped about equally often: no corner is favoured."""
    visible, priority, counts = masking._draw(FIXED, 16, 1, range(1500))
    kept = masking._final(visible, priority, counts)[0].reshape(-1, 16, 16)
    left = visible[0].reshape(-1, 16, 16)
    share = kept.sum(0) / left.sum(0)
    assert abs(share[:8].mean() - share[8:].mean()) < 0.02
    assert abs(share[:, :8].mean() - share[:, 8:].mean()) < 0.02


def test_masks_are_pure_functions_of_seed_and_index():
    together = masking.draw_masks(FIXED, *TINY)
    backwards = masking.draw_masks(FIXED, 8, 3, 0, list(range(6))[::-1])
    assert torch.equal(together.tokens, backwards.tokens.flip(0))
    for b in range(6):
        alone = masking.draw_masks(FIXED, 8, 3, 0, [b])
        assert torch.equal(alone.tokens[0], together.tokens[b])
    assert not torch.equal(masking.draw_masks(FIXED, 8, 3, 1, range(6)).tokens, together.tokens)
    assert len({tuple(row.tolist()) for row in together.tokens}) == 6
    assert torch.equal(masking.draw_masks(FIXED, 8, 3, 0, torch.arange(6)).tokens, together.tokens)


def test_the_two_masks_of_a_clip_are_drawn_independently():
    same = MaskConfig(blocks=(8, 8), scale=(0.15, 0.15), keep=(0.375, 0.375))
    first, second = masking.draw_visible(same, 16, 0, 0)
    assert not np.array_equal(first, second)


def test_golden_mask_never_changes():
    """A resumed run must see the masks it would have seen."""
    first, second = masking.draw_visible(FIXED, 8, seed=0, index=5)
    assert first.tolist() == GOLDEN_FIRST
    assert second.tolist() == GOLDEN_SECOND


def by_hand(mask: MaskConfig, grid: int, seed: int, index: int, m: int) -> list[int]:
    """Visible positions of one clip under its mask `m`, drawn block by block and cell by cell."""
    n, blocks, area = grid * grid, mask.blocks[m], int(mask.scale[m] * grid * grid)
    for attempt in range(masking.ROUNDS):
        numbers = rng.numpy_rng(seed, "mask", index, m, attempt).random(3 * masking.TRIES * blocks + n)
        draws, priority = numbers[:-n].reshape(masking.TRIES, 3, blocks), numbers[-n:]
        for shape, tops, lefts in draws:
            ratio = mask.aspect[0] + shape[0] * (mask.aspect[1] - mask.aspect[0])
            height = min(max(round(math.sqrt(area * ratio)), 1), grid)
            width = min(max(round(math.sqrt(area / ratio)), 1), grid)
            hidden = set()
            for top, left in zip(tops, lefts, strict=True):
                y, x = int(top * (grid - height + 1)), int(left * (grid - width + 1))
                hidden |= {grid * (y + i) + x + j for i in range(height) for j in range(width)}
            left_over = [place for place in range(n) if place not in hidden]
            keep = mask.counts(n)[m] if mask.static else max(len(left_over), 1)
            if len(left_over) >= keep:
                return sorted(sorted(left_over, key=lambda place: priority[place])[:keep])
    raise AssertionError("never enough")


@pytest.mark.parametrize("mask, grid", [(FIXED, 16), (FIXED, 8), (PACKED, 8)])
def test_masks_of_many_clips_are_those_drawn_by_hand(mask, grid):
    indices = [0, 7, 2**40, *range(100, 121)]
    masks = masking.draw_masks(mask, grid, 1, 5, indices)
    for segment in masks.segments:
        clips = range(len(indices)) if isinstance(segment.clips, slice) else [segment.clips]
        for row, clip in enumerate(clips):
            assert masks.of(segment)[row].tolist() == by_hand(mask, grid, 5, indices[clip], segment.mask)


def test_fixed_layout_is_mask_frame_position():
    masks = masking.draw_masks(FIXED, *TINY)
    assert masks.counts == (24, 12) and masks.clips == 6
    assert masks.tokens.shape == (6, 3 * 36) and masks.tokens.dtype == torch.int64
    assert [(s.mask, s.clips, s.start, s.length) for s in masks.segments] == [
        (0, slice(0, 6), 0, 72),
        (1, slice(0, 6), 72, 36),
    ]
    for b in range(6):
        want = masking.draw_visible(FIXED, 8, 0, b)
        for segment in masks.segments:
            tubes = masks.of(segment)[b].reshape(3, -1)
            for frame in range(3):  # the same positions in every frame
                assert (tubes[frame] - 64 * frame).tolist() == want[segment.mask].tolist()
    assert torch.equal(masks.frames.unique(), torch.arange(3))


def test_more_frames_keep_the_same_positions():
    short, long = (masking.draw_masks(FIXED, 8, t, 0, [3]) for t in (1, 5))
    assert torch.equal(short.of(short.segments[0]), long.of(long.segments[0])[:, :24])


def test_packed_is_one_ragged_row_of_all_the_blocks_leave():
    masks = masking.draw_masks(PACKED, *TINY)
    assert masks.tokens.shape[0] == 1 and masks.counts == ()
    assert [(s.clips, s.mask) for s in masks.segments] == [(b, m) for b in range(6) for m in range(2)]
    assert sum(s.length for s in masks.segments) == masks.tokens.shape[1]
    lengths = set()
    for segment in masks.segments:
        want = masking.draw_visible(PACKED, 8, 0, segment.clips)[segment.mask]
        assert np.array_equal(want, np.flatnonzero(blocks_leave(PACKED, 8, segment.clips, segment.mask)))
        tubes = masks.of(segment).reshape(3, -1)
        assert torch.equal(tubes, torch.from_numpy(want) + 64 * torch.arange(3)[:, None])
        lengths.add(segment.length)
    assert len(lengths) > 2, "not ragged"


def test_truncate_cuts_at_the_smallest_count_of_the_micro_batch():
    packed, masks = masking.draw_masks(PACKED, *TINY), masking.draw_masks(TRUNCATE, *TINY)
    for m, segment in enumerate(masks.segments):
        whole = [packed.of(s)[0] for s in packed.segments if s.mask == m]
        assert segment.length == min(len(row) for row in whole)
        for b, row in enumerate(whole):
            assert torch.equal(masks.of(segment)[b], row[: segment.length])
    alone = masking.draw_masks(TRUNCATE, 8, 3, 0, [0])
    assert alone.segments[0].length >= masks.segments[0].length  # it depends on the micro-batch


def test_every_mask_leaves_something():
    """Two blocks of 0.7 hide everything in 7% of draws on this grid; those are drawn again."""
    visible, _, _ = masking._draw(PACKED, 8, 0, range(400))
    assert visible.any(-1).all()


def test_impossible_settings_say_so():
    hopeless = MaskConfig(blocks=(8,), scale=(0.5,), keep=(0.875,))
    with pytest.raises(ConfigError, match="8 mask blocks of scale 0.5 never left 56 of 64"):
        masking.draw_visible(hopeless, 8, 0, 0)
    with pytest.raises(ConfigError, match="token frame"):
        masking.draw_masks(FIXED, 8, 0, 0, [0])
    with pytest.raises(ConfigError, match="empty"):
        masking.draw_masks(FIXED, 8, 3, 0, [])
