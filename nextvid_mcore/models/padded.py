"""Ragged stretches in one attention call: each is a row of its own, padded to the longest.

For packed masks (Section 3.4's blocks, cut at no count), where every clip's mask is a stretch of another
length. `kernels.masked` calls attention once a stretch and is the reference; small networks then wait for
launches: 128 stretches of 64 clips, forwards and backwards, in each layer. (The joint predictor of Table 2,
whose stretches have two rules, keeps to the reference.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextvid_mcore.models import sdpa

if TYPE_CHECKING:
    from nextvid_mcore.models.attention import AttentionPattern

MULTIPLE = 16  # of tokens, to which the longest is rounded up: kernels want whole rows of a mask aligned


@dataclass(frozen=True)
class Side:
    """One row's tokens laid out as [stretches, longest]; padding repeats a stretch's last token."""

    take: Tensor  # int64 [stretches * longest]: the token of the row at each place
    back: Tensor  # int64 [s]: the place of each token of the row
    real: Tensor  # bool [stretches, longest]: no padding
    frames: Tensor  # [stretches, longest]

    @staticmethod
    def of(frames: Tensor, lengths: Sequence[int]) -> Side:
        """frames: numbers of the row's tokens, [s]; lengths: of the stretches, which lie end to end in it."""
        stretches, longest = len(lengths), -(-max(lengths) // MULTIPLE) * MULTIPLE
        length = torch.tensor(lengths, device=frames.device)
        start, place = length.cumsum(0) - length, torch.arange(longest, device=frames.device)
        take = (start[:, None] + torch.minimum(place, length[:, None] - 1)).flatten()
        shift = torch.arange(stretches, device=frames.device) * longest - start
        back = torch.arange(len(frames), device=frames.device)
        back = back + shift.repeat_interleave(length, output_size=len(frames))
        return Side(take, back, place < length[:, None], frames[take].view(stretches, longest))

    def pad(self, x: Tensor) -> Tensor:
        """[1, A, s, d] -> [stretches, A, longest, d]."""
        rows = x[0].transpose(0, 1).index_select(0, self.take)
        return rows.unflatten(0, self.real.shape).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """`pad`'s inverse."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.back).transpose(0, 1)[None]


@dataclass(frozen=True)
class Padded:
    """A pattern's stretches laid out for one call."""

    queries: Side
    keys: Side
    allowed: Tensor  # bool [stretches, 1, longest queries, longest keys]: by the rule, to real keys alone

    @functools.cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    def bias(self, dtype: torch.dtype) -> Tensor:
        """`allowed` as what is added to the scores; made once for all layers, which keep it for backward."""
        if dtype not in self._biases:
            zeros = torch.zeros_like(self.allowed, dtype=dtype)
            self._biases[dtype] = zeros.masked_fill_(~self.allowed, float("-inf"))
        return self._biases[dtype]

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [1, A, queries, d], k and v [1, A, keys, d] -> a row a stretch."""
        return self.queries.pad(q), self.keys.pad(k), self.keys.pad(v)


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """The same as `kernels.masked`, of a pattern that has `padded`."""
    laid = pattern.padded
    out = sdpa.attend(*laid.rows(q, k, v), laid.bias(q.dtype))
    return laid.queries.unpad(out)
