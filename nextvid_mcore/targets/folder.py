"""What the targets that come as published folders share: a config.json, and weights in safetensors.

Only safetensors are read: pickles and TorchScript archives (Cosmos is published as those too) can run
code when they are opened.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from nextvid_mcore.config import ConfigError, require

FLAG = "--target.checkpoint"


def read_json(folder: str | None, kind: str, example: str) -> dict[str, Any]:
    """config.json of the folder that --target.checkpoint names; ConfigError if there is none."""
    require(folder is not None, f"target {kind} needs {FLAG} DIR: {example}")
    path = Path(folder) / "config.json"
    below = sorted(path.parent.glob("*/config.json"))  # of a whole repository, as Cosmos' vae/
    hint = f"; there is {below[0].parent}" if below else ""
    require(path.is_file(), f"{FLAG} {folder}: no config.json there{hint}; give {example}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{FLAG} {folder}: config.json is not JSON ({error})") from None
    require(isinstance(config, dict), f"{FLAG} {folder}: config.json holds no JSON object")
    return config


def need_package(name: str, kind: str) -> ModuleType:
    """The imported package, or a ConfigError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"target {kind} needs the package {name} ({error}): pip install {name}, or generate pixels with "
            "--target.kind pixels"
        ) from None


@contextlib.contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """Without transformers' table of weights that a model has no use for, hundreds of a SigLIP2's text model:
    which may be missing or left over is checked, strictly, by those who load."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


def need_weights(folder: str) -> None:
    """Raise ConfigError unless the folder holds safetensors."""
    require(
        any(Path(folder).glob("*.safetensors")),
        f"{FLAG} {folder} holds no .safetensors file; files of other kinds can run code when they are opened "
        "and are not read",
    )


def check_loaded(info: dict[str, Any], folder: str, spare: tuple[str, ...] = ()) -> None:
    """Raise ConfigError unless every weight was there with its shape and none was left over.

    info: what `from_pretrained(..., output_loading_info=True)` reports; spare: prefixes of weights that the
    folder may hold besides.
    """
    surplus = sorted(k for k in info["unexpected_keys"] if not k.startswith(spare))
    reshaped = sorted(
        str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]
    )
    for what, names in (
        ("missing", sorted(info["missing_keys"])),
        ("surplus", surplus),
        ("of another shape", reshaped),
    ):
        require(
            not names,
            f"{FLAG} {folder}: {len(names)} weights are {what}: {', '.join(names[:4])}"
            + (" and more" if len(names) > 4 else ""),
        )
