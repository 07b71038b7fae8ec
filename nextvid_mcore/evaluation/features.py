"""From items of a data set to frozen features [B, V, N, D], computed as they are asked for or kept on disk.

The tokens of a video's segments, and of several encoder layers, stand in one row (Table 10). A store's name
is a digest of what its numbers depend on: encoder, data, reading, layers, type. It is a flat file,
memory-mapped, that several processes fill together; one that was stopped goes on where it was. It knows
files by their paths: what couldn't be read is tried again, a file that was replaced is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.data.guard import BadFileLog
from nextvid_mcore.data.loader import iterate
from nextvid_mcore.data.transforms import normalize
from nextvid_mcore.evaluation.datasets import VIEWS, ProbeBatch, ProbeData, Request
from nextvid_mcore.evaluation.encoders import Encoder, identity
from nextvid_mcore.evaluation.presets import ProbeConfig
from nextvid_mcore.evaluation.ranks import Ranks


class Rows(NamedTuple):
    """Features of a request's items, on the probe's device."""

    features: Tensor  # [B, V, N, D]
    label: Tensor  # int64 [B, tasks]
    good: Tensor  # bool [B]


class Source(Protocol):
    """Where a training loop gets features from."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]: ...


@dataclass
class Extractor:
    """Runs the encoder on a data set's clips."""

    encoder: Encoder
    data: ProbeData
    layers: tuple[int, ...]
    ranks: Ranks
    reduce: Literal["tokens", "mean"] = "tokens"  # mean over the tokens: for linear and kNN
    encode_batch: int = 32  # clips in one forward pass
    half: bool = False  # bf16 autocast, and features kept in bf16
    workers: int = 0
    timeout: float = 600.0
    log: BadFileLog = field(default_factory=lambda: BadFileLog("it can't be trained on and counts as wrong"))
    passes: int = 0  # clips encoded so far

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    @torch.no_grad()
    def encode(self, batch: ProbeBatch) -> Rows:
        """Features of one batch."""
        video = batch.video.to(self.ranks.device, non_blocking=True)
        items, views, segments = video.shape[:3]
        clips = video.flatten(0, 2)
        parts = []
        for part in clips.split(self.encode_batch):
            part = normalize(part)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.half):
                tokens = torch.cat(self.encoder(part, self.layers), dim=1)  # [clips, layers * s, D]
            self.passes += len(part)
            if self.reduce == "mean":
                tokens = tokens.float().mean(1, keepdim=True)
            parts.append(tokens.to(self.dtype))
        tokens = torch.cat(parts).unflatten(0, (items, views, segments)).flatten(2, 3)
        if self.reduce == "mean":
            tokens = tokens.float().mean(2, keepdim=True).to(self.dtype)
        device = self.ranks.device
        return Rows(tokens, batch.label.to(device), batch.good.to(device))

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        pin = self.workers > 0 and self.ranks.device.type == "cuda"
        batches = iterate(
            self.data, requests, workers=self.workers, timeout=self.timeout, pin=pin, log=self.log
        )
        for batch in batches:
            yield self.encode(batch)

    def shape(self, copy: int) -> tuple[int, int, int]:
        """(V, N, D) of an item's features in this reading."""
        return tuple(self.encode(self.data[Request(copy, (0,))]).features.shape[1:])


def chunks(indices: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(indices[first : first + size]) for first in range(0, len(indices), size)]


# The store ---------------------------------------------------------------------------------------


class Store:
    """Features of some items in one reading, on disk. `fill` computes what is missing, `stream` reads."""

    def __init__(
        self,
        folder: Path,
        extractor: Extractor,
        copy: int,
        indices: Sequence[int],
        encoder_id: str | None = None,
    ) -> None:
        self.extractor, self.copy, self.indices = extractor, copy, np.array(indices, dtype=np.int64)
        self.shape = (len(indices), *extractor.shape(copy))
        self.wide = extractor.dtype == torch.float32
        config = extractor.data.config
        clips = config.segments * (config.views if copy == VIEWS else 1)
        self.chunk = max(1, 64 // clips)  # items that are read, encoded and marked as done together
        facts = {
            "version": 2,
            "encoder": encoder_id or identity(extractor.encoder),
            "data": extractor.data.identity,
            "reading": _reading(config, copy),
            "indices": hashlib.blake2b(self.indices.tobytes(), digest_size=16).hexdigest(),
            "layers": list(extractor.layers),
            "reduce": extractor.reduce,
            "shape": list(self.shape),
            "dtype": "float32" if self.wide else "bfloat16",
        }
        text = json.dumps(facts, sort_keys=True)
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.facts = facts
        self._order = np.argsort(self.indices, kind="stable")

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.wide else 2)

    def _map(self, name: str, dtype: type, shape: tuple[int, ...], create: bool = False) -> np.memmap:
        path, length = self.folder / name, math.prod(shape) * np.dtype(dtype).itemsize
        if not create and (found := path.stat().st_size) != length:  # numpy would make up what is missing
            raise ValueError(f"{name} has {found} bytes instead of {length}")
        return np.memmap(path, dtype, "w+" if create else "r+", shape=shape)

    def _maps(self, create: bool = False) -> dict[str, np.memmap]:
        items, tasks = len(self.indices), len(self.extractor.data.tasks)
        return {
            "features": self._map("features.bin", np.uint32 if self.wide else np.uint16, self.shape, create),
            "label": self._map("label.bin", np.int64, (items, tasks), create),
            "good": self._map("good.bin", np.uint8, (items,), create),
            "done": self._map("done.bin", np.uint8, (-(-items // self.chunk),), create),
        }

    def fill(self, progress=None) -> None:  # noqa: ANN001 (a tqdm class or None)
        """Compute what isn't there yet, all ranks together."""
        ranks = self.extractor.ranks
        if ranks.first and not (self.folder / "facts.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if self.bytes > free:
                raise ConfigError(
                    f"cached features need {self.bytes / 1e9:.1f} GB and {self.folder.parent} has "
                    f"{free / 1e9:.1f} GB free; run without --cache, or cache somewhere else"
                )
            self._maps(create=True)
            (self.folder / "facts.new").write_text(json.dumps(self.facts, indent=2))
            os.replace(self.folder / "facts.new", self.folder / "facts.json")
        ranks.barrier()
        try:
            maps = self._maps()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.folder} is damaged ({error}); delete it and start again") from None
        bad = np.flatnonzero(maps["good"] == 0) // self.chunk  # such files may be repaired by now
        todo = np.unique(np.concatenate([np.flatnonzero(maps["done"] == 0), bad])).tolist()
        ranks.barrier()  # nobody marks anything before everybody has looked
        parts = chunks(self.indices.tolist(), self.chunk)
        mine = ranks.share(todo)
        rows = self.extractor.stream(Request(self.copy, parts[number]) for number in mine)
        bar = progress(total=len(mine), unit="chunk", desc="features", leave=False) if progress else None
        for number, part in zip(mine, rows, strict=True):
            where = slice(number * self.chunk, number * self.chunk + len(part.label))
            maps["features"][where] = _to_numpy(part.features)
            maps["label"][where], maps["good"][where] = part.label.cpu().numpy(), part.good.cpu().numpy()
            for name in ("features", "label", "good"):
                maps[name].flush()
            maps["done"][number] = 1
            if bar:
                bar.update()
        maps["done"].flush()
        if bar:
            bar.close()
        ranks.barrier()
        self.maps = self._maps()
        require(
            bool(self.maps["done"].all()), f"{self.folder} is still incomplete; delete it and start again"
        )

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        device = self.extractor.ranks.device
        for request in requests:
            require(request.copy == self.copy, f"the store holds copy {self.copy}, not {request.copy}")
            wanted = np.array(request.indices, dtype=np.int64)
            place = np.searchsorted(self.indices, wanted, sorter=self._order)
            rows = self._order[np.minimum(place, len(self.indices) - 1)]
            require(bool((self.indices[rows] == wanted).all()), "the store lacks an item that was asked for")
            yield Rows(
                _to_torch(self.maps["features"][rows]).to(device),
                torch.from_numpy(np.array(self.maps["label"][rows])).to(device),
                torch.from_numpy(np.array(self.maps["good"][rows])).bool().to(device),
            )


def _reading(config: ProbeConfig, copy: int) -> dict[str, Any]:
    """The settings that a reading depends on: of the drawn ones also the crops and the seed."""
    names = ["segments", "views", "frames", "rate", "rate_is", "size"]
    if copy >= 0:
        names += ["crop_scale", "crop_aspect", "flip", "seed"]
    return {"copy": copy} | {name: getattr(config, name) for name in names}


def _to_numpy(x: Tensor) -> np.ndarray:
    """The bits of a float32 or bfloat16 tensor (numpy has no bfloat16)."""
    x = x.detach().cpu().contiguous()
    return (
        x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
        .numpy()
        .view(np.uint32 if x.dtype == torch.float32 else np.uint16)
    )


def _to_torch(x: np.ndarray) -> Tensor:
    wide = x.dtype == np.uint32
    bits = torch.from_numpy(np.array(x).view(np.int32 if wide else np.int16))
    return bits.view(torch.float32 if wide else torch.bfloat16)


class Copies:
    """Several stores as one source: each request goes to the store of its copy."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = {store.copy: store for store in stores}

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        for request in requests:
            yield from self.stores[request.copy].stream([request])
