"""Exported networks in plain PyTorch: no megatron, no training code, torch and safetensors alone.

    from nextvid_mcore.hub import load_encoder
    encoder = load_encoder("exports/tiny")             # a folder of tools/convert_to_torch.py
    features = encoder(video)                           # [B, 3, T, H, W] in [-1, 1] -> [B, t*h*w, D]

Loading is strict: a key, shape, file or version that isn't expected is a `HubError` that names it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from nextvid_mcore.hub.decoder import Decoder
from nextvid_mcore.hub.predictor import Predictor
from nextvid_mcore.hub.vit import VisionTransformer

__all__ = ["Decoder", "HubError", "Predictor", "VisionTransformer"]
__all__ += ["load_config", "load_decoder", "load_encoder", "load_predictor"]

FORMAT_VERSION = 1
FILES = {
    "encoder": "model.safetensors",
    "predictor": "predictor.safetensors",
    "decoder": "decoder.safetensors",
}
MODULES = {"encoder": VisionTransformer, "predictor": Predictor, "decoder": Decoder}
_SHAPE = ("width", "depth", "heads", "mlp_width")
CONFIG_KEYS: dict[str, type] = {
    "format_version": int,  # of this folder's layout and names
    "version": str,  # of the nextvid_mcore that wrote it
    "recipe": str,
    "step": int,  # finished training steps
    "weights": str,  # of the encoder: "ema" or "online"; predictor and decoder have no EMA
    "image_size": int,
    "frames": int,  # of the clips that it last trained on
    "patch_size": int,
    "tubelet_size": int,
    **{key: int for key in _SHAPE},
    "norm_eps": float,
    "rope_base": float,
    **{f"{role}_{key}": int for role in ("predictor", "decoder") for key in _SHAPE},
    "target_kind": str,
    "target_channels": int,  # C
}
LATER: dict[str, str | float] = {  # keys that folders written before them lack: their values there
    "target_pixel_scale": 1.0,  # of target_kind pixels: latents over this are pixels
    "clips": "",  # moving-digits:SIZE:SIDE where it was trained on clips that are made
}


class HubError(ValueError):
    """An exported folder that cannot be used."""


def check_config(config: dict, where: str) -> dict:
    """`config`, with what it lacks of `LATER`, if its keys are known and its values of the right kind."""
    version = config.get("format_version")
    for key, what in (("stages", "a training run"), ("model_type", "a folder for transformers")):
        if version is None and key in config:
            raise HubError(f"{where} is of {what}; give what tools/convert_to_torch.py RUN --out DIR wrote")
    if version != FORMAT_VERSION:
        raise HubError(f"{where}: format version {version!r}; this code reads version {FORMAT_VERSION}")
    kinds = CONFIG_KEYS | {key: type(value) for key, value in LATER.items()}
    config = LATER | config
    missing, surplus = kinds.keys() - config.keys(), config.keys() - kinds.keys()
    if missing or surplus:
        raise HubError(f"{where}: {_names('missing', missing)}{_names('unknown', surplus)}".rstrip("; "))
    for key, kind in kinds.items():
        value, lowest = config[key], 0 if key == "step" else 1
        if kind is str and not isinstance(value, str):
            raise HubError(f"{where}: {key} is {value!r}; it must be text")
        if kind is int and (type(value) is not int or value < lowest):
            raise HubError(f"{where}: {key} is {value!r}; it must be a whole number from {lowest}")
        if kind is float and (type(value) not in (int, float) or not value > 0):
            raise HubError(f"{where}: {key} is {value!r}; it must be a positive number")
    return config


def _names(word: str, names: set[str] | list[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{word} {', '.join(names[:limit])}{more}; " if names else ""


def load_config(folder: str | Path) -> dict:
    """The checked config.json of an exported folder."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise HubError(f"{path} does not exist; give a folder that tools/convert_to_torch.py wrote") from None
    except json.JSONDecodeError as error:
        raise HubError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise HubError(f"{path} holds no JSON object")
    return check_config(config, str(path))


def check_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    """Raise a HubError unless `state` has exactly the names and shapes of `expected`."""
    missing, surplus = expected.keys() - state.keys(), state.keys() - expected.keys()
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if missing or surplus or shapes:
        message = _names("missing", missing) + _names("surplus", surplus) + _names("wrong shapes:", shapes)
        raise HubError(f"{where}: {message.rstrip('; ')}")


def _load(role: str, folder: str | Path, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(folder)
    path = Path(folder) / FILES[role]
    if not path.exists():
        hint = "" if role == "encoder" else "; convert with --all to export it"
        raise HubError(f"{path} does not exist{hint}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise HubError(f"{path} cannot be read: {error}") from None
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced anyway
        module = MODULES[role].from_config(config)
    check_state(state, module.state_dict(), str(path))
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device=device, dtype=dtype).eval()


def load_encoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VisionTransformer:
    """The encoder of an exported folder, in eval mode."""
    return _load("encoder", folder, device, dtype)


def load_predictor(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Predictor:
    """The predictor (with the projection of the context) of a folder exported with --all."""
    return _load("predictor", folder, device, dtype)


def load_decoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The flow decoder of a folder exported with --all."""
    return _load("decoder", folder, device, dtype)
