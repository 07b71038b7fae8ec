"""Collapse monitors: is the prediction, or the feature it is aligned to, shrinking to a constant?

Two variances (each channel's over all tokens of the step, averaged over the channels) and the cosine
between the aligned prediction and the reference features. All are exact over micro-batches and ranks:
means and squared deviations are merged (Chan et al., 1979), since a difference of raw second moments
loses every digit exactly when features collapse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nextvid_mcore.models import fused


class Moments:
    """Count, mean and sum of squared deviations of W channels, in float64."""

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed  # [1 + 2 W]: count, mean, squared deviations

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of `x` [..., W] over all leading dimensions."""
        in_memory = sorted(range(x.dim() - 1), key=x.stride, reverse=True)  # a permuted tensor is not copied
        return cls._of_union(fused.moments(x.detach().permute(*in_memory, -1).flatten(0, -2)).double())

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of the union, whatever the parts' sizes."""
        return cls._of_union(torch.stack([part.packed for part in parts]))

    @classmethod
    def _of_union(cls, rows: Tensor) -> Moments:
        """rows: [parts, 1 + 2 W], float64."""
        count, (mean, deviations) = rows[:, :1], rows[:, 1:].chunk(2, dim=1)
        total = count.sum(0)
        middle = (count * mean).sum(0) / total
        spread = (deviations + count * (mean - middle).square()).sum(0)
        return cls(torch.cat([total, middle, spread]))

    def variance(self) -> Tensor:
        """Variance over the tokens, averaged over the channels, []."""
        count, spread = self.packed[0], self.packed[1:].chunk(2)[1]
        return (spread / count).mean()

    def mean(self) -> Tensor:
        return self.packed[1:].chunk(2)[0].mean()


def moments(z: Tensor, reference: Tensor | None = None, aligned: Tensor | None = None) -> tuple[Tensor, ...]:
    """Packed, of z, and of reference and of its cosine with aligned if there are these: `Collapse.NAMES`."""
    if reference is None:
        return (Moments.of(z).packed,)
    cosine = fused.cosine(aligned.detach(), reference.detach())
    return tuple(Moments.of(x).packed for x in (z, reference, cosine.unsqueeze(-1)))


class Collapse:
    """Gathers one step's features micro-batch by micro-batch; `result` closes the step.

    `add` may see any share of the step's tokens, with sequence parallelism too: then the tensor group is
    one of the groups that `result` merges over. Ranks that hold the same tokens must not be merged.
    """

    NAMES = ("z_var", "reference_var", "align_cos")

    def __init__(self, align: bool = True) -> None:
        """align: False where there are no features to compare with; `z_var` alone is left then."""
        self.align = align
        self.names = self.NAMES if align else self.NAMES[:1]
        self._parts: dict[str, list[Moments]] = {name: [] for name in self.names}

    def add(self, z: Tensor, reference: Tensor | None = None, aligned: Tensor | None = None) -> None:
        """z [..., E] predictions, reference [..., D] features, aligned [..., D] their predictions.

        `reference` may be 1 where `aligned` is more: it is then the same for several predictions.
        """
        self.take(moments(z, reference if self.align else None, aligned))

    def take(self, packed: Sequence[Tensor]) -> None:
        """What `moments` made of them."""
        for name, part in zip(self.names, packed, strict=True):
            self._parts[name].append(Moments(part))

    def result(self, groups: Sequence[dist.ProcessGroup] = ()) -> Tensor:
        """The monitors over everything added on all ranks of `groups`, as `names`; empties the collection."""
        merged = [Moments.merged(self._parts[name]) for name in self.names]
        sizes = [part.packed.numel() for part in merged]
        for group in groups:
            if dist.get_world_size(group) == 1:
                continue
            mine = torch.cat([part.packed for part in merged])
            gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, mine, group=group)
            columns = zip(*(each.split(sizes) for each in gathered), strict=True)
            merged = [Moments.merged([Moments(part) for part in column]) for column in columns]
        self.__init__(self.align)
        return torch.stack(
            [
                part.mean() if name == "align_cos" else part.variance()
                for name, part in zip(self.names, merged, strict=True)
            ]
        )


class Constant:
    """Notices that all predictions have become one vector, and that they differ again.

    They come out of a LayerNorm, so one is the scale of their variance over tokens, at any width and at
    every step of a run. Below `SAME` they differ by a hundredth of their size; real data stays far above.
    """

    SAME, AGAIN = 1e-4, 1e-3
    PATIENCE = 100  # steps: many runs pass through it (docs/results.md)

    def __init__(self) -> None:
        self.steps = 0  # in a row that predictions have been the same

    def note(self, step: int, variance: float) -> str | None:
        """What to say after `step`, whose predictions had this variance (`z_var`); mostly nothing."""
        told = self.steps >= self.PATIENCE
        if variance < self.SAME or (told and not variance > self.AGAIN):
            self.steps += 1
            if self.steps == self.PATIENCE:
                return (
                    f"step {step}: for {self.PATIENCE} steps the predictions have been one vector at all "
                    f"tokens (z_var {variance:.1e}, of 1): encoder and predictor have shrunk to a constant, "
                    "and hardly learn until it grows back. A longer warm-up, a lower learning rate or clips "
                    "with less background help: docs/results.md, What went wrong first"
                )
            return None
        self.steps = 0
        return (
            f"step {step}: predictions differ from token to token again (z_var {variance:.1e})"
            if told
            else None
        )
