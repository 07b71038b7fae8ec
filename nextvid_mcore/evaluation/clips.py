"""Clips to look at: from a manifest, a list, a folder or a single file, read as evaluation reads them.

Middle window, centre crop, no flip (as in the held-out loss); an image is a clip of equal frames.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextvid_mcore.config import MOVING_DIGITS, ConfigError, require
from nextvid_mcore.data import decode
from nextvid_mcore.data.decode import BadFile
from nextvid_mcore.data.manifest import Item, Manifest
from nextvid_mcore.data.sampler import build_mixture
from nextvid_mcore.data.sources import LISTS, Source, kind_of
from nextvid_mcore.data.transforms import centre_crop, normalize, resize_clip
from nextvid_mcore.hub import VisionTransformer


@dataclass(frozen=True)
class Clip:
    """One item, read."""

    video: Tensor  # float32 [3, T, H, W] in [-1, 1]
    label: int  # -1: none
    name: str
    image: bool


@dataclass(frozen=True)
class Items:
    """What a path names. `classes`: names of the labels, where folders or a manifest give them."""

    items: Sequence[Item]
    classes: tuple[str, ...] = ()


def find(path: str | Path, limit: int | None = None, kind: str | None = None) -> Items:
    """Items of a manifest (folder of .parquet), a list ("path label"), a folder or a file.

    limit: at most so many; of a manifest they are drawn in its sets' proportions, of the others evenly.
    kind: only videos or only images. ConfigError where nothing is found.
    """
    path = Path(path).expanduser().absolute()
    require(path.exists(), f"there is no {path}; give a manifest, a list, a folder, a video or an image")
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        found = _of_manifest(Manifest.open(path), limit, kind)
    else:
        found = _of_files(path, limit, kind)
    require(len(found.items) > 0, f"{path} names no {kind or 'video or image'}")
    return found


def _of_manifest(manifest: Manifest, limit: int | None, kind: str | None) -> Items:
    mixture, total = build_mixture(manifest), manifest.rows
    classes = next((table.classes for table in manifest.sets.values() if table.classes), ())
    names = {name for name, table in manifest.sets.items() if table.classes}
    seen: dict[str, Item] = {}
    for index in range(total):
        name, row = mixture.held_out(index)
        item = manifest.item(name, row)
        if kind in (None, item.kind):  # with several labelled sets a label alone says nothing
            label = item.label if len(names) <= 1 else -1
            seen.setdefault(item.path, item._replace(label=label))
        if len(seen) == limit or index > 50 * (limit or total):
            break
    return Items(list(seen.values()), classes if len(names) == 1 else ())


def _of_files(path: Path, limit: int | None, kind: str | None) -> Items:
    classes: tuple[str, ...] = ()
    if path.is_file() and path.suffix.lower() not in LISTS:
        entries = [Item(str(path), kind_of(path.name) or "", -1)]
    else:
        source = Source("clips", path, None)
        classes = source.classes()
        entries = [Item(e.path, e.kind or "", e.label) for e in source.entries(classes)]
        if path.is_dir() and {item.label for item in entries} == {-1}:
            classes = ()
    # a list may name a file many times: it is one clip here, which would be its own nearest neighbour
    entries = list({item.path: item for item in entries if item.kind and kind in (None, item.kind)}.values())
    if limit is not None and len(entries) > limit:
        entries = [entries[i] for i in np.linspace(0, len(entries) - 1, limit).round().astype(int)]
    return Items(entries, classes)


def check_shape(encoder: VisionTransformer, frames: int, size: int, fps: float) -> None:
    """ConfigError unless the encoder takes clips of this shape, read at such a rate."""
    require(0 < fps < math.inf, f"--fps must be positive, got {fps:g}")
    try:
        encoder.grid((1, 3, frames, size, size))
    except ValueError as error:
        raise ConfigError(f"--frames {frames}: {error}") from None


def read(item: Item, frames: int, size: int, fps: float) -> Clip:
    """The item's clip; BadFile if it can't be decoded."""
    if item.kind == "image":
        pixels = decode.read_image(item.path)[None]
    else:
        video = decode.Video(item.path)
        step = decode.frame_step(video.fps, fps)
        pixels = video.read(decode.clip_indices(video.frames, step, frames, None))
    clip = normalize(resize_clip(pixels, centre_crop(*pixels.shape[1:3]), size, False))
    image = item.kind == "image"
    return Clip(clip.expand(-1, frames, -1, -1) if image else clip, item.label, Path(item.path).name, image)


def read_all(items: Items, frames: int, size: int, fps: float) -> Iterator[Clip]:
    """Clips of all items that can be decoded; the others are named on the way."""
    for item in items.items:
        try:
            yield read(item, frames, size, fps)
        except BadFile as error:
            print(f"skipped: {error}")


def moving_digits(
    count: int, frames: int, size: int, skip: int = 0, source: str = MOVING_DIGITS, trained_on: str = ""
) -> list[Clip]:
    """Clips `skip` .. of MNIST's test digits, as pretraining sees them, named by what they show.

    source, trained_on: how large the digits are, see `digits_source.side_of`.
    """
    from nextvid_mcore.data.digits_source import DigitClips, side_of
    from nextvid_mcore.data.moving_digits import DIRECTIONS

    side = side_of(source, size, trained_on)
    video, labels = DigitClips("test", size, side=side).clips(range(skip, skip + count), frames)
    names = [f"a {digit} moving {DIRECTIONS[direction]}" for digit, direction in labels.tolist()]
    return [Clip(clip, -1, name, False) for clip, name in zip(normalize(video), names, strict=True)]


@torch.no_grad()
def pooled(encoder: torch.nn.Module, clips: Iterator[Clip], batch: int = 8) -> tuple[Tensor, Tensor]:
    """Mean features [N, D] and labels [N] of clips, by an encoder [B, 3, T, H, W] -> [B, s, D]."""
    features, labels = [], []
    while part := list(itertools.islice(clips, batch)):
        features.append(encoder(torch.stack([clip.video for clip in part])).float().mean(1))
        labels.extend(clip.label for clip in part)
    require(len(features) > 0, "no clip could be decoded")
    return torch.cat(features), torch.tensor(labels)
