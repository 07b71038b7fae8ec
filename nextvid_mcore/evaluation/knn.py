"""Nearest neighbours by cosine: no training, so the quickest look at what features hold.

Used by the probe (--method knn), by tools/tsne.py and, while a run trains, by training/online_knn.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvid_mcore.config import require

TEMPERATURE = 0.07  # of the neighbours' votes, exp(cosine / temperature)
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
