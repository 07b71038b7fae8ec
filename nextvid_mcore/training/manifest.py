"""What makes a checkpoint's files trustworthy: sizes, checksums, durable writes, and no foreign pickles.

`manifest.json` is written last and lists every other file with its size and SHA-256: a folder without it is
partial. Tensors are read by torch's restricted unpickler already; two things are not, and are checked here
before megatron-core reads them: `.metadata`, a pickle of which only the classes listed below are let
through, and byte entries among the tensors, which must load with `weights_only`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

MANIFEST = "manifest.json"
METADATA = ".metadata"
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_SAFE_CLASSES = {
    (_MODULES[0], name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    (_MODULES[1], "_StorageInfo"),
    (_MODULES[1], "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, found or trusted. One sentence, with the way out."""


def write_json(path: Path, content: Any) -> None:
    """Write and flush to the disk."""
    with open(path, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest, once every file it lists is there with its size. CheckpointError otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {
            str(name): {"size": int(f["size"]), "sha256": str(f["sha256"])} for name, f in manifest.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not written to the end") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} can't be read ({error})") from None
    for name, expected in files.items():
        if os.sep in name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{folder / name} has {size} bytes instead of {expected['size']}")
    return files


def check_content(folder: Path, files: dict[str, dict[str, Any]], share: int = 0, shares: int = 1) -> None:
    """Compare checksums of every `shares`-th file with the manifest."""
    for name in sorted(files)[share::shares]:
        if fingerprint(folder / name) != files[name]:
            raise CheckpointError(
                f"{folder / name} does not have the checksum it was saved with: it was damaged or changed; "
                f"use another checkpoint"
            )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE_CLASSES or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's {METADATA} asks for {module}.{name}, which no checkpoint needs"
        )


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def check_pickles(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse a checkpoint in which anything but tensors and plain values would be unpickled."""
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise CheckpointError(f"{folder / METADATA} can't be read ({error})") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder / METADATA} holds a {type(metadata).__name__}, not metadata")
    if (folder / "common.pt").exists():
        raise CheckpointError(f"{folder} has a common.pt, which this program never writes")
    for place in metadata.storage_data.values():
        if place.relative_path not in files:
            raise CheckpointError(f"{folder / METADATA} points to {place.relative_path}, not in the manifest")
    for name, kind in metadata.state_dict_metadata.items():
        if not isinstance(kind, BytesStorageMetadata):
            continue
        place = metadata.storage_data[MetadataIndex(name)]
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            torch.load(content, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{folder}: entry {name} is not plain data ({reason})") from None
