"""rope.py: axes, order, agreement with megatron-core, and dependence on differences of position only."""

import pytest
import torch

from nextvid_mcore import rope
from nextvid_mcore.config import ConfigError


@pytest.mark.parametrize("width, dims", [(64, 20), (32, 10), (80, 26), (24, 8), (12, 4), (6, 2)])
def test_axis_dims(width, dims):
    assert rope.axis_dims(width) == (dims, dims, dims)


def test_too_narrow_a_head_is_refused():
    with pytest.raises(ConfigError, match="width 4"):
        rope.axis_dims(4)


def test_positions_are_in_t_h_w_order():
    grid = rope.grid_positions(2, 3, 4)
    assert torch.equal(grid, torch.cartesian_prod(*map(torch.arange, (2, 3, 4))))
    ids = torch.tensor([[3, 23], [12, 5]])
    assert torch.equal(rope.token_positions(ids, 3, 4), grid[ids])


def test_angles_by_hand():
    """Head 64: angle j of an axis is position * 10000 ** (-2 j / 20); the axes stand side by side, twice."""
    got = rope.angles(torch.tensor([5, 7, 11]), 64)
    want = [p * 10000.0 ** (-2 * j / 20) for p in (5, 7, 11) for j in range(10)]
    assert got.shape == (60,) and got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want + want, dtype=torch.float32), rtol=1e-6, atol=0)


def test_positions_must_have_three_axes():
    with pytest.raises(ConfigError, match="not 2"):
        rope.angles(torch.zeros(4, 2), 64)


@pytest.mark.parametrize("width", [64, 32, 12])
def test_scores_depend_on_differences_of_position_only(width):
    """In float64, so that what is left is not rounding; shifts go beyond the training grid."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 50, width, generator=generator, dtype=torch.float64)
    here, there = torch.randint(0, 16, (2, 50, 3), generator=generator)

    def scores(shift):
        move = torch.tensor(shift)
        a = rope.rotate(q, rope.angles(here + move, width).double())
        b = rope.rotate(k, rope.angles(there + move, width).double())
        return (a * b).sum(-1)

    base = scores([0, 0, 0])
    for shift in ([1, 0, 0], [0, 3, 0], [0, 0, 9], [24, 5, 2]):
        torch.testing.assert_close(scores(shift), base, rtol=0, atol=2e-4)
    plain = (q * k).sum(-1)
    assert (base - plain).abs().max() > 0.5, "the rotation does nothing"
    for axis in range(3):  # and every axis matters
        move = torch.zeros(3, dtype=torch.long)
        move[axis] = 1
        moved = rope.rotate(q, rope.angles(here + move, width).double())
        other = (moved * rope.rotate(k, rope.angles(there, width).double())).sum(-1)
        assert (other - base).abs().max() > 0.1


def test_rest_of_the_head_passes_and_norms_stay():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    y = rope.rotate(x, rope.angles(rope.grid_positions(5, 1, 1), 64))
    assert torch.equal(x[:, 60:], y[:, 60:])
    torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))
    assert torch.equal(x[0], y[0])  # position (0, 0, 0) turns nothing


def test_megatron_applies_our_angles_as_rotate_does():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(24, 2, 3, 32, generator=generator)  # [s, B, A, d]
    angles = rope.angles(rope.grid_positions(2, 3, 4), 32)[:, None, None, :]  # [s, 1, 1, R]
    assert torch.equal(_apply_rotary_pos_emb_bshd(x, angles), rope.rotate(x, angles))
    ids = torch.randint(0, 24, (24, 2), generator=generator)  # per clip, as masks need: [s, B, 1, R]
    angles = rope.angles(rope.token_positions(ids, 3, 4), 32)[:, :, None, :]
    assert torch.equal(_apply_rotary_pos_emb_bshd(x, angles), rope.rotate(x, angles))
