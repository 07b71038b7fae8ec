"""The probes' classifiers: attentive (Table 10: one cross-attention layer, one learned query) and linear.

A sweep trains many of them side by side on the same features, and the tokens are by far the largest thing
in it: 16,384 of a K400 video. With a single query that is a parameter, keys and values of all tokens are
never needed. The score of a token x in an attention head is q . (Wk x) = (Wk^T q) . x, so each head is one
vector; and the weighted sum of values is Wv times the weighted sum of tokens. What is left per token is one
product with heads x members vectors: a sweep of 20 costs little more than one probe, and gives what the
textbook form gives (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvid_mcore.config import require

EPS = 1e-6


class AttentiveProbe(nn.Module):
    """Norm, cross-attention from one learned query, residual, optionally an MLP, linear classifier."""

    def __init__(self, width: int, classes: int, heads: int = 16, mlp: bool = False) -> None:
        super().__init__()
        require(
            width % heads == 0,
            f"features of width {width} do not divide into {heads} heads; set --heads to a divisor",
        )
        self.width, self.heads = width, heads
        self.norm = nn.LayerNorm(width, eps=EPS)  # of the tokens
        self.query = nn.Parameter(torch.zeros(width))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # a bias adds the same to all scores
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.mlp = None
        if mlp:
            self.mlp = nn.Sequential(
                nn.LayerNorm(width, eps=EPS),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
        self.classifier = nn.Linear(width, classes)

    def initialise(self, generator: torch.Generator) -> None:
        """Truncated normal weights of deviation 0.02, zero biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 or name == "query":
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def scorers(self) -> Tensor:
        """[A, D]: the product with a normalised token is its score in each head."""
        query = self.q(self.query).unflatten(0, (self.heads, -1))  # [A, d]
        key = self.k.weight.unflatten(0, (self.heads, -1))  # [A, d, D]
        return torch.einsum("ad,adw->aw", query, key) * self.norm.weight * query.shape[1] ** -0.5

    def classify(self, pooled: Tensor) -> Tensor:
        """pooled [B, A, D], the tokens' mean under each head's weights -> logits [B, classes]."""
        pooled = pooled * self.norm.weight + self.norm.bias
        value = self.v.weight.unflatten(0, (self.heads, -1))  # [A, d, D]
        out = torch.einsum("baw,adw->bad", pooled, value).flatten(1) + self.v.bias
        out = self.query + self.proj(out)
        if self.mlp is not None:
            out = out + self.mlp(out)
        return self.classifier(out)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, classes]"""
        return run([self], tokens)[0]


class LinearProbe(nn.Module):
    """A linear classifier on the normalised mean of the tokens."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.trunc_normal_(self.classifier.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, classes]"""
        return run([self], tokens)[0]


def run(members: Sequence[nn.Module], tokens: Tensor) -> list[Tensor]:
    """Logits [B, classes] of every member, all of one kind, for tokens [B, N, D]. Tokens get no gradient."""
    dtype = next(members[0].parameters()).dtype
    tokens = tokens.detach().to(dtype)
    if isinstance(members[0], LinearProbe):
        mean = F.layer_norm(tokens.mean(1), tokens.shape[-1:], eps=EPS)
        return [member.classifier(mean) for member in members]
    tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
    scorers = torch.cat([member.scorers() for member in members])  # [A of all members, D]
    weights = (tokens @ scorers.T).softmax(dim=1)  # [B, N, A...]
    pooled = weights.transpose(1, 2) @ tokens  # [B, A..., D]
    parts = pooled.split([member.heads for member in members], dim=1)
    return [member.classify(part) for member, part in zip(members, parts, strict=True)]
