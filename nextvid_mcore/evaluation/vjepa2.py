"""V-JEPA 2's encoder in plain PyTorch, from its published checkpoints.

Its weights fit the hub's ViT: same blocks, a token sees all others, and a patch is flattened alike. Two
things differ. Pixels are normalised with ImageNet's mean and deviation. And its rotary embedding has a
quirk, which it keeps because its weights were trained with it: dimensions 2i and 2i + 1 are turned as a
pair, but the angles stand as [f | f] (half-split), so that the two of a pair get different angles. That
is no rotation, and no reordering of dimensions makes it one, so it is computed as it is.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.evaluation.encoders import HubEncoder
from nextvid_mcore.hub import HubError, check_state
from nextvid_mcore.hub.vit import CONFIG_KEYS, Plan, SelfAttention, VisionTransformer, attend, grid_positions

FORMAT = "vjepa2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = {1024: 16, 1280: 16, 1408: 22}  # of the published widths: a checkpoint's tensors don't tell
ROLES = ("target_encoder", "ema_encoder", "encoder")  # the EMA is what is evaluated
PREFIXES = ("module.", "backbone.")  # of DistributedDataParallel and of the masked wrapper


def quirk_angles(positions: Tensor, head_width: int, base: float) -> Tensor:
    """Angles [..., 3r] of positions [..., 3]: for each axis [f | f], r = 2 * floor(floor(d / 3) / 2)."""
    half = head_width // 3 // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    turn = positions.float()[..., None] / base**exponent  # [..., 3, r / 2]
    return torch.cat([turn, turn], dim=-1).flatten(-2)


def quirk_rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, A, s, d]: neighbours (2i, 2i + 1) as pairs, each with its own angle; the tail stays plain."""
    width = angles.shape[-1]
    turned, plain = x[..., :width], x[..., width:]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
    turned = turned * angles.cos().to(x.dtype) + swapped * angles.sin().to(x.dtype)
    return torch.cat([turned, plain], dim=-1)


class QuirkAttention(SelfAttention):
    """The hub's attention with V-JEPA 2's rotary embedding."""

    def forward(self, x: Tensor, angles: Tensor, plan: Plan | None) -> Tensor:
        """x [B, s, D], angles [1, 1, s, R] -> [B, s, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(quirk_rotate(q, angles), quirk_rotate(k, angles), v, plan)
        return self.proj(out.transpose(1, 2).flatten(2))


class VJEPA2(VisionTransformer):
    """V-JEPA 2's encoder. Video is normalised already: (pixels in [0, 1] - MEAN) / STD."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        for block in self.blocks:
            block.attn = QuirkAttention(self.width, self.heads)
            block.attn.apply(self._init)

    def forward(self, video: Tensor, return_layers: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """[B, 3, T, H, W] -> [B, t*h*w, D], or such a tensor after each block of `return_layers`, normed."""
        layers = None if return_layers is None else [self._layer(index) for index in return_layers]
        positions = grid_positions(*self.grid(video.shape), device=video.device)
        angles = quirk_angles(positions, self.width // self.heads, self.rope_base)[None, None]
        x = self.patch_embed(self.patchify(video).to(self.patch_embed.weight.dtype))
        return self._blocks(x, angles, None, layers, norm_layers=True)


def convert(
    state: Mapping[str, Tensor], heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state under the hub's names) from the encoder's state under its published names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for prefix in PREFIXES:
            name = name.replace(prefix, "")
        renamed[name.replace("patch_embed.proj.", "patch_embed.")] = value.detach().float().contiguous()
    patch = renamed.get("patch_embed.weight")
    require(
        patch is not None and patch.dim() == 5 and patch.shape[1] == 3 and patch.shape[3] == patch.shape[4],
        "there is no patch_embed.proj.weight [D, 3, tubelet, patch, patch]: not a V-JEPA 2 video encoder",
    )
    require(
        "pos_embed" not in renamed, "the encoder has a learned or sine pos_embed: V-JEPA 1, not 2 with RoPE"
    )
    width, _, tubelet, patch_size, _ = patch.shape
    depth = 1 + max((int(n.split(".")[1]) for n in renamed if n.startswith("blocks.")), default=-1)
    fc1 = renamed.get("blocks.0.mlp.fc1.weight")
    require(depth > 0 and fc1 is not None, "the encoder has no blocks.0.mlp.fc1.weight")
    heads = heads or HEADS.get(width)
    require(heads is not None, f"an encoder of width {width} is none of the published ones; give --heads")
    renamed["patch_embed.weight"] = patch.detach().float().flatten(1).contiguous()
    config = {
        "format": FORMAT,
        "image_size": 256,
        "frames": 64,
        "patch_size": patch_size,
        "tubelet_size": tubelet,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_width": fc1.shape[0],
        "norm_eps": 1e-6,
        "rope_base": 10000.0,
    }
    return config, renamed


def build(config: Mapping[str, Any], state: dict[str, Tensor], where: str) -> VJEPA2:
    """The encoder with these weights; a missing, surplus or misshapen one is a `ConfigError`."""
    missing = [key for key in CONFIG_KEYS if key not in config]
    require(not missing, f"{where}: the config lacks {', '.join(missing)}; import the checkpoint again")
    try:
        with torch.device("meta"):
            module = VJEPA2(**{key: config[key] for key in CONFIG_KEYS})
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; give other --heads") from None
    try:
        check_state(state, module.state_dict(), where)
    except HubError as error:
        raise ConfigError(str(error)) from None
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def read_checkpoint(path: str | Path, role: str | None = None) -> dict[str, Tensor]:
    """The encoder's state in a published .pt file. Tensors and plain values alone are unpickled."""
    try:
        # Only the zip format can be mapped; older files are read whole.
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # an unpickler raises anything on a foreign file
        raise ConfigError(f"{path} is not a checkpoint of plain tensors ({type(error).__name__})") from None
    require(isinstance(whole, dict), f"{path} holds no dictionary, so it is no V-JEPA 2 checkpoint")
    if all(isinstance(value, Tensor) for value in whole.values()):
        return whole
    there = [name for name in ([role] if role else ROLES) if isinstance(whole.get(name), dict)]
    require(
        bool(there),
        f"{path} holds {', '.join(map(str, whole))} and no {role or ' or '.join(ROLES)}; name its encoder "
        "with --key",
    )
    return whole[there[0]]


def from_checkpoint(path: str | Path, heads: int | None = None) -> VJEPA2:
    """The encoder of a published checkpoint."""
    config, state = convert(read_checkpoint(path), heads)
    return build(config, state, str(path))


def save(folder: str | Path, config: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, each whole or not at all."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors.new")
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
    (folder / "config.json.new").write_text(json.dumps(dict(config), indent=2) + "\n")
    os.replace(folder / "config.json.new", folder / "config.json")


def load(folder: str | Path) -> VJEPA2:
    """The encoder of a folder that `save` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be read: {error}; import the checkpoint again") from None
    require(config.get("format") == FORMAT, f"{folder} is no imported V-JEPA 2; see tools/import_vjepa2.py")
    return build(config, state, str(folder))


def encoder(module: VJEPA2, name: str) -> HubEncoder:
    """As a probe's encoder, which takes video in [-1, 1]."""
    return HubEncoder(name, module, MEAN, STD)
