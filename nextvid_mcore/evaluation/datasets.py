"""What is probed: labelled clips by index, from lists of files or made on the fly.

A data set answers requests (copy, indices) with a `ProbeBatch`. Copy PLAIN takes clips from the middle of
their segments and the centre of the frame, VIEWS `views` crops along the long side instead; copy c >= 0
draws windows, crop and flip by (seed, c, index). So a reading is a pure function of the request.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextvid_mcore.config import require
from nextvid_mcore.data import decode, transforms
from nextvid_mcore.data.decode import BadFile
from nextvid_mcore.data.digits_source import DigitClips
from nextvid_mcore.data.moving_digits import TASKS
from nextvid_mcore.data.sources import LISTS, Source
from nextvid_mcore.evaluation.presets import ProbeConfig
from nextvid_mcore.rng import numpy_rng

PLAIN, VIEWS = -1, -2  # in place of a copy
MAX_BAD = 0.05  # share of unreadable items of a split; above it there is no result
LOOKED_AT = 256  # files of a list that must be there before anything starts


class Request(NamedTuple):
    """Some items of a data set, and which reading of them."""

    copy: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class ProbeBatch:
    """Items of one request, in its order."""

    video: Tensor  # uint8 [B, V, S, 3, T, H, W]: views, segments
    label: Tensor  # int64 [B, tasks]
    good: Tensor  # bool [B]; False: unreadable, its video is empty
    bad: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    refused: list[tuple[str, str]] = field(default_factory=list)  # as in ClipBatch; decord reads all

    def pin_memory(self) -> ProbeBatch:
        return replace(self, **{n: getattr(self, n).pin_memory() for n in ("video", "label", "good")})


class ProbeData(Protocol):
    """A data set of one split."""

    config: ProbeConfig
    tasks: dict[str, int]  # label and number of its classes
    identity: str  # the same identity, the same items and clips

    def __len__(self) -> int: ...
    def __getitem__(self, request: Request) -> ProbeBatch: ...


# Segments and views ------------------------------------------------------------------------------


def segment_indices(
    total: int, step: int, frames: int, segments: int, places: Sequence[float] | None
) -> np.ndarray:
    """Frames of each segment's clip: int64 [S, T].

    A video long enough is cut into S equal parts, with one clip inside each: in its middle, or at
    `places` [S] in [0, 1). In a shorter one the clips overlap, evenly spread from its start to its end. One
    shorter than a clip repeats its last frame.
    """
    span = (frames - 1) * step + 1
    part = total // segments
    if part >= span or segments == 1:
        slack = max(0, part - span)
        offsets = [slack // 2] * segments if places is None else [int(p * (slack + 1)) for p in places]
        starts = np.arange(segments) * part + np.array(offsets)
    else:
        starts = np.arange(segments) * max(0, total - span) // (segments - 1)
    return np.minimum(starts[:, None] + step * np.arange(frames), total - 1)


def view_crops(height: int, width: int, views: int) -> list[transforms.Crop]:
    """Squares of the short side, from one end of the long side to the other; a single one is centred."""
    if views == 1:
        return [transforms.centre_crop(height, width)]
    side, slack = min(height, width), abs(height - width)
    starts = [slack * view // (views - 1) for view in range(views)]
    return [
        transforms.Crop(start if height > width else 0, 0 if height > width else start, side, side)
        for start in starts
    ]


def check_there(where: Path, paths: Sequence[str]) -> None:
    """Refuse a list of which more than MAX_BAD is missing, before hours of training: `LOOKED_AT` are looked
    at, the first and the last among them."""
    some = np.unique(np.linspace(0, len(paths) - 1, LOOKED_AT).round().astype(int))
    missing = [str(paths[i]) for i in some if not os.path.exists(paths[i])]
    require(
        len(missing) <= MAX_BAD * len(some),
        f"{where}: {len(missing)} of {len(some)} files looked at are not there, e.g. {missing[:1]}; relative "
        "paths are taken from the list's folder",
    )


# Lists of files ----------------------------------------------------------------------------------


class ListData(Dataset):
    """A V-JEPA list ("path label" on each line) or a folder with one subfolder a class."""

    def __init__(
        self,
        path: str | Path,
        config: ProbeConfig,
        classes: int | None = None,
        frames_of_image: int | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """`frames_of_image`: of a still picture's clip; encoders that look at single frames need one.
        `names`: of the training set's classes, where its folders name them; this set's folders are those."""
        path = Path(path).expanduser().absolute()
        require(path.exists(), f"there is no {path}; give a list of files or a folder of class folders")
        require(
            path.is_dir() or path.suffix.lower() in LISTS,
            f"{path} is neither a folder nor a list ({', '.join(sorted(LISTS))})",
        )
        source = Source("probe", path, None)
        found = source.classes()
        strange = sorted(set(found) - set(names)) if names else []
        require(
            not strange,
            f"{path}: class folder {', '.join(strange[:3])} is none of the training set's classes",
        )
        require(
            bool(names) or not found or classes in (None, len(found)),
            f"{path} has {len(found)} class folders and the training list {classes} classes: folders are "
            "numbered by their names, so give a list here too",
        )
        self.names = tuple(names) or found
        entries = list(source.entries(self.names))
        require(len(entries) > 0, f"{path} names no video or image")
        unknown = next((e.path for e in entries if e.kind is None), None)
        require(
            unknown is None,
            f"{path}: {unknown} ends like neither video nor image; a line is a path, then a whole number",
        )
        none = next((e.path for e in entries if e.label < 0), None)
        require(none is None, f"{path}: {none} has no label; write it behind the path, or use class folders")
        self.label = np.array([entry.label for entry in entries], dtype=np.int64)
        top = int(self.label.max())
        count = classes or config.classes or top + 1
        low = "; labels count from 0, and none is 0 here" if self.label.min() > 0 else ""
        require(top < count, f"{path}: label {top}, but there are {count} classes (0 to {count - 1}){low}")
        self.path, self.config = str(path), config
        self.paths = np.array([entry.path for entry in entries])
        self.still = np.array([entry.kind == "image" for entry in entries])
        self.image_frames = frames_of_image or config.frames
        self.tasks = {"label": count}
        digest = hashlib.blake2b(digest_size=16)
        for entry in entries:
            digest.update(f"{entry.path}\t{entry.label}\n".encode(errors="surrogateescape"))
        self.identity = digest.hexdigest()
        mixed = bool(self.still.any()) and not self.still.all()
        require(not mixed, f"{path} mixes images and videos; give one list for each")
        self.frames = self.image_frames if self.still[0] else config.frames
        check_there(path, self.paths)

    def __len__(self) -> int:
        return len(self.label)

    def notes(self) -> list[str]:
        """What of the list is worth a word."""
        out, again = [], len(self) - len(set(self.paths.tolist()))
        if again:
            out.append(f"{self.path}: {again} of {len(self)} lines name a file once more; each counts")
        return out

    def __getitem__(self, request: Request) -> ProbeBatch:
        copy, indices = request
        config, bad, clips = self.config, [], []
        views = config.views if copy == VIEWS else 1
        shape = (views, config.segments, 3, self.frames, config.size, config.size)
        for index in indices:
            try:
                clips.append(self._read(index, copy))
            except BadFile as error:
                bad.append((error.path, error.reason))
                clips.append(None)
        video = [torch.zeros(shape, dtype=torch.uint8) if clip is None else clip for clip in clips]
        return ProbeBatch(
            video=torch.stack(video) if video else torch.zeros((0, *shape), dtype=torch.uint8),
            label=torch.from_numpy(self.label[list(indices)])[:, None],
            good=torch.tensor([clip is not None for clip in clips], dtype=torch.bool),
            bad=bad,
        )

    def _read(self, index: int, copy: int) -> Tensor:
        """uint8 [V, S, 3, T, size, size] of one item."""
        config, path = self.config, str(self.paths[index])
        rng = None if copy < 0 else numpy_rng(config.seed, "probe", 2, copy, index)
        if self.still[index]:
            pixels, back = decode.read_image(path)[None], np.zeros((config.segments, self.frames), np.int64)
        else:
            video = decode.Video(path)
            step = int(config.rate)
            if config.rate_is == "fps":
                step = decode.frame_step(video.fps, config.rate)
            places = None if rng is None else rng.random(config.segments)
            wanted = segment_indices(video.frames, step, config.frames, config.segments, places)
            unique, back = np.unique(wanted, return_inverse=True)
            pixels, back = video.read(unique), back.reshape(wanted.shape)
        height, width = pixels.shape[1:3]
        rows = []
        for segment in back:
            which, place = np.unique(segment, return_inverse=True)
            if rng is None:
                crops, flip = view_crops(height, width, config.views if copy == VIEWS else 1), False
            else:
                crops = [transforms.random_crop(rng, height, width, config.crop_scale, config.crop_aspect)]
                flip = bool(rng.random() < config.flip)
            clips = [transforms.resize_clip(pixels[which], crop, config.size, flip) for crop in crops]
            rows.append(torch.stack(clips)[:, :, torch.from_numpy(place.ravel())])  # [V, 3, T, H, W]
        return torch.stack(rows, dim=1)


# Moving digits -----------------------------------------------------------------------------------


class DigitData(Dataset):
    """Moving digits as in pretraining, with both labels, made on the device that asks. Never cropped, so
    copies differ in nothing."""

    def __init__(self, split: str, items: int, config: ProbeConfig, device: torch.device | str) -> None:
        require(items >= 1, f"moving digits: {items} clips; give 1 or more")
        require(
            config.segments == config.views == 1,
            f"moving digits have one segment and one view, not {config.segments} and {config.views}",
        )
        self.clips = DigitClips(split, config.size, seed=config.seed, device=device, side=config.side)
        self.config, self.items, self.tasks = config, items, dict(TASKS)
        self.identity = f"moving-digits on grey {split} {items} {config.seed} every {self.clips.hold}"
        if config.side is not None:
            self.identity += f" of {config.side}"

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, request: Request) -> ProbeBatch:
        video, label = self.clips.clips(request.indices, self.config.frames)
        return ProbeBatch(video[:, None, None], label, torch.ones(len(label), dtype=torch.bool))


def build_data(
    config: ProbeConfig,
    train: str | None,
    val: str | None,
    device: torch.device | str,
    per_frame: bool = False,
) -> tuple[ProbeData, ProbeData]:
    """The training and the validation set. `per_frame`: a still picture is one frame, not a clip."""
    if config.dataset == "moving_digits":
        require(
            train is None and val is None, "moving digits are made, not read: leave --train and --val out"
        )
        require(
            config.train_items is not None and config.val_items is not None,
            "moving digits need --train-items and --val-items",
        )
        return (
            DigitData("train", config.train_items, config, device),
            DigitData("test", config.val_items, config, device),
        )
    require(
        train is not None and val is not None,
        f"{config.dataset} needs --train and --val: lists with 'path label' on each line, or class folders",
    )
    frames = 1 if per_frame else None
    first = ListData(train, config, frames_of_image=frames)
    second = ListData(val, config, first.tasks["label"], frames, first.names)
    shared = sorted(set(second.paths.tolist()) & set(first.paths.tolist()))
    require(
        not shared,
        f"{len(shared)} of {len(second)} items of {second.path} are training items too, e.g. {shared[:1]}; "
        "give a held-out list",
    )
    require(
        len(np.unique(first.label)) > 1,
        f"all items of {first.path} have label {first.label[0]}: there is nothing to tell apart",
    )
    return first, second


def lists_notes(train: ProbeData, val: ProbeData) -> list[str]:
    """What is odd about the lists."""
    if not (isinstance(train, ListData) and isinstance(val, ListData)):
        return []
    notes = [*train.notes(), *val.notes()]
    there, asked = np.unique(train.label), np.unique(val.label)
    if there[0] == 1 and there[-1] == len(there):
        notes.append(f"training labels are 1 to {there[-1]}: class 0 is there, empty (labels count from 0)")
    if len(strange := np.setdiff1d(asked, there)):
        wrong = int(np.isin(val.label, strange).sum())
        notes.append(
            f"{wrong} validation items have labels that no training item has, e.g. {strange[0]}: they can't "
            "be guessed right"
        )
    return notes
