"""Nearest neighbours by cosine: no training, so the quickest look at what features hold.

`classify` is the method itself, `online_knn` the small version that a pretraining run can afford every now
and then: a few hundred clips through the encoder, forward only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvid_mcore.config import require
from nextvid_mcore.data.moving_digits import TASKS, MovingDigits

TEMPERATURE = 0.07  # of the neighbours' votes, exp(cosine / temperature)
FORWARD_SHARE = 0.4  # of a training step's work a clip, at most: one full forward pass of the encoder
BLOCK = 2**26  # similarities at a time


@torch.no_grad()
def classify(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20) -> Tensor:
    """Labels int64 [Q] of test [Q, D] by the k nearest of train [N, D], whose labels are int64 [N].

    Votes are weighted by exp(cosine / 0.07), so that of two classes with as many neighbours the nearer wins.
    """
    require(len(train) > 0, "kNN has no training features")
    k = min(k, len(train))
    train = F.normalize(train.float(), dim=-1)
    out = []
    for part in test.split(max(1, BLOCK // len(train))):
        cosine, near = (F.normalize(part.float(), dim=-1) @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, device=train.device)
        votes.scatter_add_(1, labels[near], ((cosine - cosine[:, :1]) / TEMPERATURE).exp())
        out.append(votes.argmax(1))
    return torch.cat(out) if out else labels.new_zeros(0)


def affordable_clips(every: int, batch: int, share: float = 0.02) -> int:
    """Clips that a kNN every `every` steps of `batch` clips may encode to cost at most `share` of the time.

    A training step takes a clip through the student, forward and backward, the reference, the predictor and
    the decoder; the forward pass of one clip is at most 0.4 of that (0.36 for ViT-G).
    """
    return int(share * every * batch / FORWARD_SHARE)


@torch.no_grad()
def online_knn(
    encode: Callable[[Tensor], Tensor],
    *,
    clips: int = 1536,
    frames: int = 16,
    size: int = 64,
    k: int = 20,
    batch: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Top-1 in percent on moving digits: {"knn_digit": ..., "knn_direction": ...}.

    encode: video [B, 3, T, size, size] in [-1, 1] -> tokens [B, s, D] (their mean is used) or [B, D].
    clips: encoded in all, over all ranks; two thirds are the neighbours, the rest is classified. See
        `affordable_clips`.
    gather: rows of all `ranks` in rank order (`evaluation.ranks.Ranks.gather`, or one over a process group);
        each rank encodes every `ranks`-th clip. All ranks get the same result.
    """
    require(
        clips >= 3 * ranks and k >= 1,
        f"online kNN: {clips} clips and {k} neighbours; give {3 * ranks} and 1 or more",
    )
    require(ranks == 1 or gather is not None, f"online kNN over {ranks} ranks needs a gather function")
    counts = {"train": clips * 2 // 3, "test": clips - clips * 2 // 3}

    def features(split: str) -> tuple[Tensor, Tensor]:
        source = MovingDigits(split, size, seed=seed, device=device)
        rows, labels = [], []
        mine: Sequence[int] = range(rank, counts[split], ranks)
        for first in range(0, len(mine), batch):
            video, label = source.clips(mine[first : first + batch], frames)
            out = encode(video.float() / 127.5 - 1.0)
            rows.append(out.float().mean(1) if out.dim() == 3 else out.float())
            labels.append(label)
        found = torch.cat(rows), torch.cat(labels)
        return (gather(found[0]), gather(found[1])) if gather else found

    (train, known), (test, wanted) = features("train"), features("test")
    out = {}
    for column, (task, classes) in enumerate(TASKS.items()):
        guess = classify(train, known[:, column], test, classes, k)
        out[f"knn_{task}"] = 100 * (guess == wanted[:, column]).float().mean().item()
    return out
