"""Frames of video files by the GPU's own decoders (NVDEC), through NVIDIA DALI.

DALI's `fn.decoders.video` takes the numbers of the wanted frames with every file, so which frames a clip
shows stays the loader's choice. A file that it can't read fails its whole batch and ends the pipeline: a
new one is built and the batch's files are read one by one, to find which it was. What DALI refuses, for
whatever reason, is named with that reason, and the caller reads it in another way.

By its source, DALI makes a new NVDEC decoder for every file whose sides aren't whole blocks of 16, and such
files were slow (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nextvid_mcore.config import ConfigError
from nextvid_mcore.data.decode import BadFile, guarded

if TYPE_CHECKING:
    import torch

LANES = 8  # clips decoded at a time: a Hopper GPU has seven decoders
LARGEST = 2**30  # bytes of a file: it is read whole
UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # an mp4 track's matrix
IN_MEMORY = "memory file"  # what DALI calls a file in its messages
INSTEAD = "use --data.decoder decord"


@dataclass(frozen=True)
class Job:
    """Frames wanted of a file, rising."""

    path: str
    frames: np.ndarray  # int [F]


@dataclass(frozen=True)
class Refused:
    """Why NVDEC gave no frames of a file; one line."""

    reason: str


def check() -> None:
    """Raises ConfigError unless this process could decode on a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"data.decoder dali decodes on the GPU and no CUDA device is visible; {INSTEAD}")
    try:
        import nvidia.dali.fn as fn
    except ImportError as error:
        raise ConfigError(
            f"data.decoder dali needs NVIDIA DALI, which can't be imported ({error}); install the extra "
            f"`gpu` (nvidia-dali-cuda130), or {INSTEAD}"
        ) from None
    if not hasattr(fn.decoders, "video"):
        raise ConfigError(
            f"data.decoder dali: this nvidia-dali has no fn.decoders.video; install 2.4, or {INSTEAD}"
        )


def turned(data: np.ndarray) -> bool:
    """An mp4's header says that its picture is to be rotated or mirrored. decord does it, DALI doesn't."""
    raw = data.tobytes()
    place = raw.find(b"tkhd")
    while place >= 0:
        start = place + (56 if raw[place + 4 : place + 5] == b"\1" else 44)
        if len(matrix := raw[start : start + 36]) == 36 and struct.unpack(">9i", matrix) != UPRIGHT:
            return True
        place = raw.find(b"tkhd", place + 1)
    return False


class Nvdec:
    """The decoders of one GPU. `device` None: DALI's decoders on the CPU (VP8, VP9 and MJPEG)."""

    def __init__(self, device: int | None) -> None:
        self.device = device
        self._pipeline = None

    def __getstate__(self) -> dict[str, object]:
        return {"device": self.device, "_pipeline": None}  # each process has its own

    def read(self, jobs: Sequence[Job]) -> list[torch.Tensor | Refused]:
        """Of each job its frames, uint8 [F, height, width, 3] on the device, or why there are none."""
        found: list[torch.Tensor | Refused] = [self._load(job) for job in jobs]
        here = [i for i, data in enumerate(found) if not isinstance(data, Refused)]
        for first in range(0, len(here), LANES):
            part = here[first : first + LANES]
            loaded, wanted = [found[i] for i in part], [jobs[i].frames for i in part]
            try:
                decoded = self._decode(loaded, wanted)
            except BadFile as error:
                one = len(part) == 1
                decoded = [Refused(error.reason)] if one else map(self._alone, loaded, wanted)
            for i, frames in zip(part, decoded, strict=True):
                found[i] = frames
        return found

    def _load(self, job: Job) -> np.ndarray | Refused:
        """The file's bytes."""
        try:
            size = os.path.getsize(job.path)
            if size > LARGEST:
                return Refused(f"larger than {LARGEST >> 30} GiB")
            data = np.fromfile(job.path, np.uint8)
        except OSError as error:
            return Refused(error.strerror or type(error).__name__)
        if not len(data):
            return Refused("empty file")
        return Refused("turned or mirrored by its header") if turned(data) else data

    def _alone(self, data: np.ndarray, frames: np.ndarray) -> torch.Tensor | Refused:
        try:
            return self._decode([data], [frames])[0]
        except BadFile as error:
            return Refused(error.reason)

    def _decode(self, data: Sequence[np.ndarray], frames: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """One run of the pipeline. Raises BadFile, which doesn't name the file, if any fails."""
        import torch

        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline

        def run() -> list[torch.Tensor]:
            pipeline.feed_input("encoded", list(data))
            pipeline.feed_input("frames", [numbers.astype(np.int32) for numbers in frames])
            try:
                (out,) = pipeline.run()
            except RuntimeError as error:
                raise RuntimeError(_cause(str(error))) from None
            # copied: the pipeline's next run may write where this one did
            return [torch.from_dlpack(out[i]).clone() for i in range(len(data))]

        try:
            clips = guarded(IN_MEMORY, run)
        except BadFile:
            self._pipeline = None  # no longer valid
            raise
        if self.device is not None:
            torch.cuda.current_stream(self.device).synchronize()
        if any(len(clip) != len(numbers) for clip, numbers in zip(clips, frames, strict=True)):
            raise BadFile(IN_MEMORY, "fewer frames than its header says")
        return clips

    def _build(self):  # noqa: ANN202 (DALI is imported late: it belongs to the extra `gpu`)
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types
        import torch
        from nvidia.dali import Pipeline

        if self.device is not None:
            torch.cuda.set_device(self.device)
        pipeline = Pipeline(
            batch_size=LANES, num_threads=LANES, device_id=self.device, prefetch_queue_depth=1
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            video = fn.decoders.video(
                encoded,
                frames=frames,
                pad_mode="none",  # a frame past the end is an error, and not a black picture
                affine=False,  # several of these processes share the cores
                device="cpu" if self.device is None else "mixed",
            )
            pipeline.set_outputs(video)
        pipeline.build()
        return pipeline


def _cause(message: str) -> str:
    """The line of DALI's message that says what went wrong; round it is where in the pipeline."""
    lines = [line.strip() for line in message.partition("encountered:")[2].splitlines()]
    return next((line for line in lines if line), message.strip().partition("\n")[0])
