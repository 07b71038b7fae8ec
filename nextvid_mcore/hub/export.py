"""From megatron-core's names and layouts to the hub's, and the writing of an exported folder.

Weights come whole, as a model without tensor or pipeline parallelism holds them. Names change by the
table below; queries, keys and values, which megatron-core interleaves head by head ([A, 3, d] rows, so
that a tensor rank gets whole heads), are regrouped to [3, A, d]. A name that the table lacks is an
error: nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextvid_mcore import __version__
from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig, is_made, require
from nextvid_mcore.hub import FILES, FORMAT_VERSION, HubError, check_config

RETIRED = {  # settings of earlier versions of a part, at the values with which it computes what it does now
    "Fp8Config": {"wgrad": (True,)},
    "TargetConfig": {"recorded": (False, True)},
    "TrainConfig": {"reference_stream": ("shared", "own")},
}

LAYER = {  # inside block.layers.{i} -> inside blocks.{i}
    "input_layernorm": "norm1",
    "pre_cross_attn_layernorm": "norm1",
    "self_attention.linear_qkv": "attn.qkv",
    "self_attention.linear_proj": "attn.proj",
    "cross_attention.linear_q": "attn.q",
    "cross_attention.linear_kv": "attn.kv",
    "cross_attention.linear_proj": "attn.proj",
    "pre_mlp_layernorm": "norm2",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
    "adaln": "adaln",
}
OUTSIDE = {  # of the layers
    "block.final_layernorm": "norm",
    "patch_embed": "patch_embed",
    "context_projection": "context_projection",
    "align_head": "align_head",
    "input": "input",
    "tau_embed.0": "tau_embed.0",
    "tau_embed.2": "tau_embed.2",
    "final_adaln": "final_adaln",
    "output": "output",
}
INTERLEAVED = {"self_attention.linear_qkv": 3, "cross_attention.linear_kv": 2}
_NAME = re.compile(r"(?:block\.layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")


def ungroup_heads(x: Tensor, heads: int, parts: int) -> Tensor:
    """Rows [A, parts, d] of a projection's weight or bias -> [parts, A, d], each flattened."""
    return x.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def to_hub(parameters: Iterable[tuple[str, Tensor]], heads: int) -> dict[str, Tensor]:
    """Named parameters of one of nextvid_mcore.models' networks -> the hub's state, fp32 on the CPU."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters:
        match = _NAME.fullmatch(name)
        module = match["module"] if match else None
        table = LAYER if match and match["layer"] is not None else OUTSIDE
        if name != "query" and module not in table:
            raise HubError(f"the training model's parameter {name} has no place in an export")
        value = parameter.detach().to("cpu", torch.float32)
        if name == "query":
            state[name] = value
            continue
        if module in INTERLEAVED:
            value = ungroup_heads(value, heads, INTERLEAVED[module])
        prefix = f"blocks.{match['layer']}." if table is LAYER else ""
        state[f"{prefix}{table[module]}.{match['kind']}"] = value
    return state


def run_config(plain: Mapping[str, Any]) -> RunConfig:
    """The RunConfig that a checkpoint's state.json holds as plain JSON values.

    Settings that it lacks (they came later) take their defaults; one that this code doesn't know is an
    error.
    """
    return _rebuild(RunConfig, plain, "the checkpoint's configuration")


def read_run(folder: Path) -> RunConfig:
    """The settings that a run wrote.

    Raises:
        ConfigError: there are none, or the file is damaged.
        HubError: one of them is unknown here.
    """
    path = folder / "config.json"
    require(path.exists(), f"{path} does not exist; give a run, the --out of nextvid_mcore.pretrain")
    try:
        plain = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); start the run again, which writes it anew") from None
    return run_config(plain)


def _rebuild(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        hints, gone = typing.get_type_hints(kind), RETIRED.get(kind.__name__, {})
        value = {name: x for name, x in value.items() if x not in gone.get(name, ())}
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            raise HubError(
                f"{where} has {unknown[0]!r}, which this version of the code doesn't know; update it"
            )
        try:
            return kind(**{name: _rebuild(hints[name], x, f"{where}: {name}") for name, x in value.items()})
        except TypeError as error:  # a setting without a default is missing
            raise HubError(f"{where}: {error}") from None
    if isinstance(value, list):  # tuple[X, ...] or tuple[X, Y]; JSON has no tuples
        items = typing.get_args(kind)
        return tuple(_rebuild(items[0], x, where) for x in value)
    return value


def check_generator(model: ModelConfig) -> None:
    """Refuse a predictor or decoder that the hub has no class for: those of the ablations."""
    full = {"generate": True, "align": True, "context": "isolated", "condition": "concat"}
    other = [
        f"model.{key} {getattr(model, key)}" for key, value in full.items() if getattr(model, key) != value
    ]
    if other:
        raise HubError(
            f"predictor and decoder are exported of the full model only; this run has {', '.join(other)}: "
            "its encoder alone can be exported, without --all"
        )


def frames_at(config: RunConfig, step: int) -> int:
    """Frames of the clips of the last finished step."""
    end = 0
    for stage in config.stages:
        end += stage.steps
        if step <= end:
            break
    return stage.frames


def made_clips(config: RunConfig) -> str:
    """The run's source where its clips are made (data/digits_source.py), "" where they are read."""
    return config.data.manifest if is_made(config.data.manifest) else ""


def encoder_config(config: RunConfig, frames: int) -> dict:
    """Of a run's encoder that reads clips of `frames` frames, for `VisionTransformer.from_config`."""
    model, shape = config.model, config.model.encoder
    return {
        "image_size": model.image_size,
        "frames": frames,
        "patch_size": model.patch_size,
        "tubelet_size": model.tubelet_size,
        "width": shape.width,
        "depth": shape.depth,
        "heads": shape.heads,
        "mlp_width": shape.mlp,
        "norm_eps": model.norm_eps,
        "rope_base": model.rope_base,
    }


def flat_config(config: RunConfig, channels: int, step: int, weights: str) -> dict:
    """config.json of an export. channels: C of the target; weights: "ema" or "online"."""

    def shape(role: str) -> dict[str, int]:
        x = config.model.shape(role)
        sizes = {"width": x.width, "depth": x.depth, "heads": x.heads, "mlp_width": x.mlp}
        return {f"{role}_{key}": value for key, value in sizes.items()}

    return check_config(
        {
            "format_version": FORMAT_VERSION,
            "version": __version__,
            "recipe": config.recipe,
            "step": step,
            "weights": weights,
            **encoder_config(config, frames_at(config, step)),
            **shape("predictor"),
            **shape("decoder"),
            "target_kind": config.target.kind,
            "target_channels": channels,
            "target_pixel_scale": config.target.pixel_scale,
            "clips": made_clips(config),
        },
        "the run's configuration",
    )


def write_folder(folder: Path, config: dict, states: Mapping[str, dict[str, Tensor]]) -> None:
    """Write config.json and, for each role in `states`, its safetensors file, all flushed to the disk."""
    from safetensors.torch import save_file

    metadata = {"format": "pt"}  # what transformers and others look for
    for role, state in states.items():
        save_file(state, folder / FILES[role], metadata=metadata)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.iterdir():
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
