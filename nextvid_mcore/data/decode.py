"""From a file to uint8 frames: decord for video, PIL for images (Section 3.4: clips at a given fps).

Only the frames of the clip are decoded, in the calling thread: the loader is parallel over processes.
Whatever is wrong with a file, and decoders raise many things, becomes `BadFile`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable

import numpy as np

# decord's source line, DALI's, ffmpeg's object
PRINTED_AT = r"\[\d\d:\d\d:\d\d\] \S+:\d+: |\[/\S+:\d+\] |\[[^\]]* @ 0x\w+\] "


class BadFile(Exception):
    """A file that gives no clip. `reason` is one line."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def _reason(path: str, error: Exception, printed: str = "") -> str:
    """One line from an exception and what its C libraries printed, without times, addresses and paths."""
    lines = [*printed.splitlines(), f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    for pattern, by in ((re.escape(path), "this file"), (PRINTED_AT, "")):
        lines = [re.sub(pattern, by, line).strip() for line in lines]
    return "; ".join(dict.fromkeys(line for line in lines if line))[:200]


def guarded[R](path: str, call: Callable[[], R]) -> R:
    """`call()`; its errors as `BadFile`.

    decord, DALI and ffmpeg also print what is wrong with a file, each time, and say more there than in the
    exception. It goes into the reason, which is logged once, and not to stderr.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        stderr = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            return call()
        except MemoryError:
            raise
        except Exception as error:  # RuntimeError, DECORDError, OSError, ...
            failure = error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        sink.seek(0)
        raise BadFile(path, _reason(path, failure, sink.read(4096).decode(errors="replace")))


def _open_reader(path: str):  # noqa: ANN202 (decord is imported late: the base install lacks it)
    import decord

    with open(path, "rb") as file:  # decord doesn't say which of these it was
        if not file.read(1):
            raise ValueError("empty file")
    decord.logging.set_level(decord.logging.ERROR)
    return decord.VideoReader(path, num_threads=1)


class Video:
    """An opened video: `frames`, `fps`, and `read` for the frames wanted.

    Of HEVC with open groups of pictures (x265's default) decord drops the pictures that lead a key frame it
    jumped to, and is then as many frames late; where it jumps depends on where it stood.
    """

    def __init__(self, path: str) -> None:
        self.path, self._narrow = path, False
        self._reader = guarded(path, lambda: _open_reader(path))
        self.frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        if self.frames < 1:
            raise BadFile(path, "no video frames")

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [len(indices), height, width, 3]"""

        def read() -> np.ndarray:
            self._reader.seek(0)  # so that what was read before makes no difference
            if not self._narrow:
                return self._reader.get_batch(indices.tolist()).asnumpy()
            return np.stack([unpadded(self._reader[int(i)].asnumpy()) for i in indices])

        try:
            out = guarded(self.path, read)
        except BadFile as error:
            if self._narrow or "from_size == to_size" not in error.reason:
                raise
            self._narrow = True
            out = guarded(self.path, read)
        if out.shape[0] != len(indices) or out.ndim != 4 or min(out.shape) < 1:
            raise BadFile(self.path, f"decoded to shape {out.shape}")
        return out


def unpadded(frame: np.ndarray) -> np.ndarray:
    """uint8 [height, width, c] -> [height, width, 3], where a row's bytes end in padding.

    Rows of a video 8, 12, 16, 24, 48 or 72 pixels wide are padded to a multiple of the width, which decord
    takes for more channels, and then fails to make a batch of them.
    """
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _eight_bits(image):  # noqa: ANN001, ANN202 (PIL is imported late)
    """PIL's own conversion cuts 16 bits off at 255, so nearly all of a picture would be white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; store 8 or 16 bits")
    return image


def read_image(path: str) -> np.ndarray:
    """uint8 [height, width, 3], turned as its EXIF says."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palette with transparency, large image, odd EXIF
            with Image.open(path) as image:
                return np.array(_eight_bits(ImageOps.exif_transpose(image)).convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise BadFile(path, _reason(path, error)) from None


def frame_step(native: float, wanted: float) -> int:
    """Frames from one to the next: the whole step nearest to `wanted` frames a second, at least 1."""
    if not np.isfinite(native) or native <= 0:
        return 1  # no frame rate in the file: take the frames as they come
    return max(1, round(native / wanted))


def clip_indices(total: int, step: int, frames: int, place: float | None) -> np.ndarray:
    """int64 [frames], `step` apart. The start is uniform for `place` uniform in [0, 1); None: the middle.

    A video shorter than the clip is read from its start and repeats its last frame.
    """
    last_start = max(0, total - ((frames - 1) * step + 1))
    start = last_start // 2 if place is None else int(place * (last_start + 1))
    return np.minimum(start + step * np.arange(frames), total - 1)


def probe(path: str, kind: str) -> tuple[int, float]:
    """(frames, fps) of a file that opens and whose first frame decodes; (1, 0.0) for an image."""
    if kind == "image":
        read_image(path)
        return 1, 0.0
    video = Video(path)
    video.read(np.zeros(1, np.int64))
    return video.frames, video.fps
