"""The encoder as plain PyTorch: a video ViT with 3D RoPE and frame-wise causal attention.

A token sees the tokens of its own frame and of earlier ones (Figure 3, left), so the features of frame
t never depend on what comes after it. This file imports torch alone and nothing of this package: copy
it anywhere and it works. `nextvid_mcore.hub.load_encoder` fills it from an exported folder.

Shapes: B clips, T frames of H x W pixels, t = T / tubelet, h = H / patch, w = W / patch, n = h * w
tokens of a frame, s tokens of a sequence, D width, A heads of width d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG_KEYS = (
    "image_size",
    "frames",
    "patch_size",
    "tubelet_size",
    "width",
    "depth",
    "heads",
    "mlp_width",
    "norm_eps",
    "rope_base",
)


# 3D rotary position embedding --------------------------------------------------------------------


def grid_positions(t: int, h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """(t, h, w) of every token of a clip, in that order: [t*h*w, 3]."""
    axes = [torch.arange(size, device=device) for size in (t, h, w)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def rope_angles(positions: Tensor, head_width: int, base: float) -> Tensor:
    """Angles [..., R] of positions [..., 3], in half-split form.

    Every axis rotates r = 2 * floor(floor(d / 3) / 2) dimensions of a head; the rest stay plain. With
    f = [t frequencies | h frequencies | w frequencies] the result is [f | f].
    """
    r = 2 * (head_width // 3 // 2)
    exponent = torch.arange(0, r, 2, dtype=torch.float32, device=positions.device) / r
    frequency = 1.0 / base**exponent  # [r / 2]
    half = (positions.float()[..., None] * frequency).flatten(-2)  # [..., 3, r / 2] -> [..., 3r / 2]
    return torch.cat([half, half], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first R dimensions of the heads x [B, A, s, d] by angles [B or 1, 1, s, R]."""
    width = angles.shape[-1]
    turned, plain = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, plain], dim=-1)


# Attention between frames ------------------------------------------------------------------------


Plan = list[tuple[int, int]] | Tensor  # see frame_plan


def frame_plan(query_frames: Tensor, key_frames: Tensor, strict: bool = False) -> Plan:
    """Who sees whom: keys of frames up to the query's own (`strict`: of earlier frames only).

    query_frames [B or 1, q] and key_frames [B or 1, s] are the frames of the tokens. Where every clip
    has the same frames in rising order (a whole clip; masks with equal counts), the answer is a list of
    (queries of one frame, keys they see) and no mask is ever built: half the work, and memory that
    grows with s. Otherwise it is a boolean mask [B, 1, q, s].
    """

    def uniform(frames: Tensor) -> bool:
        return bool((frames == frames[:1]).all()) and bool((frames[0, 1:] >= frames[0, :-1]).all())

    if uniform(query_frames) and uniform(key_frames):
        frames, counts = torch.unique_consecutive(query_frames[0], return_counts=True)
        seen = torch.searchsorted(key_frames[0].contiguous(), frames.contiguous(), right=not strict)
        return list(zip(counts.tolist(), seen.tolist(), strict=True))
    query, key = query_frames[:, None, :, None], key_frames[:, None, None, :]
    return key < query if strict else key <= query


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan | None) -> Tensor:
    """Attention of q [B, A, q, d] on k, v [B, A, s, d] under a `frame_plan`; None: everyone sees all."""
    if plan is None or isinstance(plan, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plan)
    out, start = [], 0
    for count, seen in plan:
        frame = q[:, :, start : start + count]
        out.append(F.scaled_dot_product_attention(frame, k[:, :, :seen], v[:, :, :seen]))
        start += count
    return torch.cat(out, dim=2)


# Layers ------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Multi-head self-attention with 3D RoPE on queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: q of all heads, k of all heads, v of all heads
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor, plan: Plan | None) -> Tensor:
        """x [B, s, D], angles [B or 1, 1, s, R] -> [B, s, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, s, 3, A, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, A, s, d]
        out = attend(rotate(q, angles), rotate(k, angles), v, plan)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor, angles: Tensor, plan: Plan | None) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, plan)
        return x + self.mlp(self.norm2(x))


# The encoder -------------------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """The encoder E of Eq. 3. `width` is D; a token covers tubelet_size frames of a square patch."""

    def __init__(
        self,
        *,
        image_size: int,
        frames: int,
        patch_size: int,
        tubelet_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2 or width // heads < 6:
            raise ValueError(f"width {width} by {heads} heads: a head must have an even width of 6 or more")
        self.image_size, self.frames = image_size, frames  # of the pretraining; others work too
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.width, self.depth, self.heads, self.rope_base = width, depth, heads, rope_base
        self.patch_embed = nn.Linear(3 * tubelet_size * patch_size**2, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not module.weight.is_meta:  # meta: weights are to be loaded
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, config: dict) -> VisionTransformer:
        """A fresh encoder of an exported config.json's sizes; its other keys are left alone."""
        missing = [key for key in CONFIG_KEYS if key not in config]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        return cls(**{key: config[key] for key in CONFIG_KEYS})

    def grid(self, video_shape: Sequence[int]) -> tuple[int, int, int]:
        """(t, h, w) of a video's shape [B, 3, T, H, W], or a ValueError that says what is wrong."""
        shape = tuple(video_shape)
        if len(shape) != 5 or shape[1] != 3:
            raise ValueError(f"video has shape {shape}: give [B, 3, T, H, W]")
        sizes = (self.tubelet_size, self.patch_size, self.patch_size)
        for name, value, size in zip(("T (frames)", "H", "W"), shape[2:], sizes, strict=True):
            if value < size or value % size:
                below = value - value % size
                fix = f"{below} or {below + size}" if below else f"{size}"
                hint = "; a picture is a clip of equal frames" if (name[0], value) == ("T", 1) else ""
                raise ValueError(
                    f"video has shape {shape}: {name} must be a multiple of {size}, e.g. {fix}{hint}"
                )
        return tuple(value // size for value, size in zip(shape[2:], sizes, strict=True))

    def patchify(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, t*h*w, 3*dt*dy*dx], a patch flattened as (c, dt, dy, dx)."""
        t, h, w = self.grid(video.shape)
        p = self.patch_size
        x = video.reshape(video.shape[0], 3, t, self.tubelet_size, h, p, w, p)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(video.shape[0], t * h * w, -1)

    def forward(
        self,
        video: Tensor,
        tokens: Tensor | Sequence[Tensor] | None = None,
        *,
        return_layers: Sequence[int] | None = None,
        norm_layers: bool = True,
        positions: Tensor | None = None,
    ) -> Tensor | list:
        """Features of a clip.

        video: [B, 3, T, H, W], floating point in [-1, 1]. T may be any multiple of the tubelet size, H
            and W of the patch size: positions outside the pretraining's grid are extrapolated.
        tokens: ids [B, s] of the visible tokens in the clip's flat (t, h, w) order; all others are
            dropped before the first block. A list of such tensors (several masks) gives a list.
        return_layers: indices of blocks, negative ones from the end: gives a list with the features
            after each of them, passed through the final norm unless `norm_layers` is False.
        positions: [t*h*w, 3] (t, h, w) for RoPE instead of the grid's own (say, to interpolate).
        Returns [B, t*h*w, D] in (t, h, w) order, or [B, s, D] in the order of `tokens`.
        """
        if not video.is_floating_point():
            raise ValueError(
                f"video is {video.dtype}: give floats in [-1, 1], e.g. video.float() / 127.5 - 1"
            )
        t, h, w = self.grid(video.shape)
        layers = None if return_layers is None else [self._layer(index) for index in return_layers]
        if positions is None:
            positions = grid_positions(t, h, w, video.device)
        elif positions.shape != (t * h * w, 3):
            raise ValueError(f"positions have shape {tuple(positions.shape)}: give {(t * h * w, 3)}")
        x = self.patch_embed(self.patchify(video).to(self.patch_embed.weight.dtype))  # [B, t*h*w, D]
        angles = rope_angles(positions, self.width // self.heads, self.rope_base)  # [t*h*w, R]

        if tokens is None:
            plan = [(h * w, (frame + 1) * h * w) for frame in range(t)]
            return self._blocks(x, angles[None, None], plan, layers, norm_layers)

        def masked(ids: Tensor) -> Tensor | list[Tensor]:
            self._check_tokens(ids, x)
            visible = x.gather(1, ids[..., None].expand(-1, -1, self.width))
            frames = ids.div(h * w, rounding_mode="floor")
            return self._blocks(
                visible, angles[ids][:, None], frame_plan(frames, frames), layers, norm_layers
            )

        return masked(tokens) if isinstance(tokens, Tensor) else [masked(ids) for ids in tokens]

    def forward_features(self, video: Tensor) -> Tensor:
        """timm's name for the features of whole clips: [B, 3, T, H, W] -> [B, t*h*w, D]."""
        return self(video)

    def get_intermediate_layers(
        self, video: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Features after the last `n` blocks, or after those whose indices `n` lists.

        Each is [B, t*h*w, D], or [B, D, t, h, w] with `reshape`; `norm`: passed through the final norm.
        """
        t, h, w = self.grid(video.shape)
        if isinstance(n, int) and not 1 <= n <= self.depth:
            raise ValueError(f"the last {n} blocks were asked for; the encoder has {self.depth}")
        indices = range(self.depth - n, self.depth) if isinstance(n, int) else n
        features = self(video, return_layers=indices, norm_layers=norm)
        return tuple(x.transpose(1, 2).unflatten(2, (t, h, w)) if reshape else x for x in features)

    def _blocks(
        self, x: Tensor, angles: Tensor, plan: Plan, layers: list[int] | None, norm_layers: bool
    ) -> Tensor | list[Tensor]:
        kept = {}
        for index, block in enumerate(self.blocks):
            x = block(x, angles, plan)
            if layers is not None and index in layers:
                kept[index] = self.norm(x) if norm_layers else x
        return self.norm(x) if layers is None else [kept[index] for index in layers]

    def _layer(self, index: int) -> int:
        if not -self.depth <= index < self.depth:
            raise ValueError(f"return_layers asks for block {index} of {self.depth}")
        return index % self.depth

    @staticmethod
    def _check_tokens(ids: Tensor, x: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.dtype != torch.int64 or ids.shape[1] == 0:
            raise ValueError(
                f"tokens are {ids.dtype} of shape {tuple(ids.shape)}: give int64 ids [B, s] for the "
                f"video's {x.shape[0]} clips, s at least 1"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= x.shape[1]:
            raise ValueError(f"token ids {low} to {high}: the clip's tokens are 0 to {x.shape[1] - 1}")
