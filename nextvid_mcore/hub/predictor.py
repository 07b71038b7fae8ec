"""The context-isolated predictor as plain PyTorch (Eq. 3 and 4, Figure 3): what comes next.

Every position of a predicted frame starts as the same learned query and reads, in each block, the
projected context of earlier frames by cross-attention. Positions don't see each other and the context
is never transformed. The output z conditions the decoder; `align` is compared with the reference
features (Eq. 5). The projection D -> E of the context is part of this module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nextvid_mcore.hub.vit import MLP, Plan, attend, frame_plan, grid_positions, rope_angles, rotate


class CrossAttention(nn.Module):
    """Queries from x, keys and values from the context; 3D RoPE on queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)  # rows: k of all heads, v of all heads
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """x [B, q, E], context [B, s, E], angles of both -> [B, q, E]."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, A, q, d]
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, A, s, d]
        out = attend(rotate(q, angles[0]), rotate(k, angles[1]), v, plan)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        x = x + self.attn(self.norm1(x), context, angles, plan)
        return x + self.mlp(self.norm2(x))


class Predictor(nn.Module):
    """context c of earlier frames -> z of the frames to predict."""

    def __init__(
        self,
        *,
        grid: int,
        token_frames: int,
        context_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.grid, self.token_frames = grid, token_frames  # of the pretraining; others work too
        self.width, self.heads, self.rope_base = width, heads, rope_base
        self.context_projection = nn.Linear(context_width, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads, mlp_width, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.align_head = nn.Linear(width, context_width)

    @classmethod
    def from_config(cls, config: dict) -> Predictor:
        return cls(
            grid=config["image_size"] // config["patch_size"],
            token_frames=config["frames"] // config["tubelet_size"],
            context_width=config["width"],
            width=config["predictor_width"],
            depth=config["predictor_depth"],
            heads=config["predictor_heads"],
            mlp_width=config["predictor_mlp_width"],
            norm_eps=config["norm_eps"],
            rope_base=config["rope_base"],
        )

    def forward(
        self,
        context: Tensor,
        tokens: Tensor,
        *,
        frames: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict whole frames from the visible tokens of the frames before them.

        context: [B, s, D], the encoder's output for the visible tokens.
        tokens: int64 [B, s], their ids in the clip's flat (t, h, w) order.
        frames: the token frames to predict, each at least 1 (default: 1 .. t-1 of the pretraining).
        grid: (h, w) of the token grid (default: the pretraining's).
        Returns z [B, len(frames)*h*w, E] and align [B, len(frames)*h*w, D], ordered (frame, h, w).
        """
        h, w = grid or (self.grid, self.grid)
        frames = list(range(1, self.token_frames)) if frames is None else list(frames)
        if context.dim() != 3 or tokens.shape != context.shape[:2] or context.shape[1] == 0:
            raise ValueError(
                f"context {tuple(context.shape)} and tokens {tuple(tokens.shape)}: give [B, s, D] and "
                "[B, s], s at least 1"
            )
        if not frames:
            raise ValueError("no frames to predict: give at least one")
        if int(tokens.min()) < 0:
            raise ValueError(f"the lowest token id is {int(tokens.min())}: ids start at 0")
        head_width = self.width // self.heads

        ids = torch.cat([torch.arange(h * w, device=tokens.device) + frame * h * w for frame in frames])
        query_frames = ids.div(h * w, rounding_mode="floor")[None]  # [1, q]
        key_frames = tokens.div(h * w, rounding_mode="floor")  # [B, s]
        first = int(key_frames.min(1).values.max())
        if min(frames) <= first:
            raise ValueError(
                f"frame {min(frames)} has no visible token before it (the first is in frame {first}); "
                f"predict frames from {first + 1}"
            )
        positions = grid_positions(max(*frames, int(key_frames.max())) + 1, h, w, tokens.device)
        angles = rope_angles(positions, head_width, self.rope_base)  # [all tokens, R]
        both = (angles[ids][None, None], angles[tokens][:, None])
        plan = frame_plan(query_frames, key_frames, strict=True)

        context = self.context_projection(context)  # [B, s, E], the same keys and values for every block
        x = self.query.expand(context.shape[0], len(ids), -1)
        for block in self.blocks:
            x = block(x, context, both, plan)
        z = self.norm(x)
        return z, self.align_head(z)
