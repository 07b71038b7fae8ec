"""Small videos and images for tests, and files that only look like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nextvid_mcore.data.avi import write_avi
from nextvid_mcore.data.manifest import Item, SetWriter

STEP = 5  # grey levels from one frame to the next


def video(path: Path, frames: int = 40, fps: float = 25.0, height: int = 48, width: int = 64) -> Path:
    """A video whose frame t is grey of level STEP * t + 10 with a brighter left half (+ 20)."""
    levels = np.arange(frames) * STEP + 10
    assert levels.max() + 20 < 256, "too many frames to tell apart"
    clip = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(np.uint8).copy()
    clip[:, :, : width // 2] += 20
    path.parent.mkdir(parents=True, exist_ok=True)
    write_avi(path, clip, fps, quality=95)
    return path


def image(path: Path, level: int = 100, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    """A picture of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).convert(mode).save(path)
    return path


def truncated(path: Path, source: Path, share: float = 0.5) -> Path:
    """The first part of a file."""
    data = source.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: int(len(data) * share)])
    return path


def frame_numbers(clip: np.ndarray) -> list[int]:
    """Frame numbers t of a decoded clip [T, height, width, 3] of `video`."""
    right = clip[:, :, -1].astype(float).mean((1, 2))
    return [round(float(level - 10) / STEP) for level in right]


def manifest(folder: Path, **sets: list[Item]) -> Path:
    """A manifest with these sets."""
    for name, items in sets.items():
        with SetWriter(folder, name) as writer:
            writer.add(items)
    return folder
