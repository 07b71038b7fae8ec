"""3D rotary position embedding over (frame, row, column), Section 3.4; a head's split as in V-JEPA 2.

A head of width d gives each axis 2 * floor(floor(d / 3) / 2) dimensions; the few that remain are not
rotated. Positions are integers, extrapolated as they are to longer clips. Angles come in the
half-split form that megatron-core's (and Transformer Engine's) rotary kernels take; the networks take their
cosines and sines (`turns`), computed once for all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextvid_mcore.config import require


def axis_dims(head_width: int) -> tuple[int, int, int]:
    """Rotated dimensions of a head for time, row and column: 64 -> (20, 20, 20), 32 -> (10, 10, 10)."""
    require(
        head_width >= 6,
        f"a head of width {head_width} has no room for three rotated axes; use heads of width 6 or more",
    )
    dims = 2 * (head_width // 3 // 2)
    return dims, dims, dims


def angles(positions: Tensor, head_width: int, base: float = 10000.0) -> Tensor:
    """Rotation angles of tokens at integer positions [..., 3] (t, h, w) -> float32 [..., R].

    R = sum(axis_dims). The R / 2 angles are [time | row | column], position * base ** (-2 i / dims) for
    the i-th of an axis, and stand twice in a row, so that dimension j of a head turns with j + R / 2.
    """
    require(
        positions.shape[-1] == 3,
        f"positions end in (t, h, w): the last size must be 3, not {positions.shape[-1]}",
    )
    parts = []
    for axis, dims in enumerate(axis_dims(head_width)):
        # In float64 first, so that the rounded frequencies are the same on every device.
        steps = torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device) / dims
        parts.append(positions[..., axis, None].float() * (base**-steps).float())
    half = torch.cat(parts, dim=-1)
    return torch.cat((half, half), dim=-1)


def turns(angles: Tensor) -> Tensor:
    """Cosines and sines of `angles` [..., R], each once: float32 [2, ..., R / 2]."""
    half = angles[..., : angles.shape[-1] // 2]
    return torch.stack((half.cos(), half.sin()))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the first R dimensions of heads x [..., d] by angles [..., R] (or broadcast); the rest passes."""
    rotated, plain = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((rotated * cos + turned * sin, plain), dim=-1)


def grid_positions(t: int, h: int, w: int) -> Tensor:
    """Positions of every token of a t x h x w grid in (t, h, w) order: int64 [t * h * w, 3]."""
    return token_positions(torch.arange(t * h * w), h, w)


def token_positions(token_ids: Tensor, h: int, w: int) -> Tensor:
    """Positions (t, h, w) of flat (t, h, w)-ordered token ids [...] -> int64 [..., 3]."""
    frame, place = token_ids // (h * w), token_ids % (h * w)
    return torch.stack((frame, place // w, place % w), dim=-1)
