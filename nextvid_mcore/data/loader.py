"""Clips in batches: each sample a pure function of (seed, global sample index), decoded in worker processes.

A request (frames, sample indices) goes to one worker and comes back as one `ClipBatch`, in order. The
number of frames travels with the request, so one pool of workers serves every stage of the schedule.
Workers are spawned, not forked: the training process has threads, a GPU and communicators that a fork
would drag along. So the module that runs as a program is imported in each worker: it must hold its
heavy imports inside `main`, behind `if __name__ == "__main__"`.

With `data.decoder dali` a worker decodes the videos of a few samples at a time on the GPU, from the same
frame numbers, crops and flips; the clips travel through host memory as decord's do, so that a decoder
that hangs or crashes takes no training process with it. What the GPU refuses is read by decord, which
also has the last word on which files are bad: both decoders draw the same files for the same samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nextvid_mcore.config import DataConfig, RunConfig, is_made, require
from nextvid_mcore.data import decode, nvdec, transforms
from nextvid_mcore.data.decode import BadFile
from nextvid_mcore.data.guard import BadFileLog, DataError
from nextvid_mcore.data.manifest import Item, Manifest
from nextvid_mcore.data.nvdec import Job, Nvdec, Refused
from nextvid_mcore.data.sampler import Mixture, Request, build_mixture
from nextvid_mcore.data.workers import shield, start_worker
from nextvid_mcore.rng import numpy_rng

if TYPE_CHECKING:
    from nextvid_mcore.data.digits_source import DigitClips

TRIES = 16  # bad files in a row that a sample may meet
LOG = BadFileLog()  # of this process: what the held-out loss and the kNN meet again is not said again


@dataclass(frozen=True)
class Sample:
    """One clip. `bad`: (path, reason) of the files tried before this one."""

    video: torch.Tensor  # uint8 [3, T, H, W]; of an image an expanded view of one frame
    index: int  # global sample index
    label: int
    item: str
    static: bool  # T identical frames
    bad: tuple[tuple[str, str], ...] = ()
    refused: tuple[str, str] | None = None  # (path, reason): decord read it in NVDEC's place


@dataclass(frozen=True)
class ClipBatch:
    """The clips of one request, in its order."""

    video: torch.Tensor  # uint8 [B, 3, T, H, W]
    index: torch.Tensor  # int64 [B], global sample indices
    label: torch.Tensor  # int64 [B], -1: none
    static: torch.Tensor  # bool [B], the T frames of this clip are the same
    items: list[str]  # [B] paths
    bad: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) met on the way
    bad_samples: int = 0  # clips of this batch that met one or more bad files
    refused: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of clips that NVDEC refused

    def pin_memory(self) -> ClipBatch:
        return replace(
            self,
            **{name: getattr(self, name).pin_memory() for name in ("video", "index", "label", "static")},
        )


def collate(samples: Sequence[Sample]) -> ClipBatch:
    return ClipBatch(
        video=torch.stack([sample.video for sample in samples]),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        label=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        static=torch.tensor([sample.static for sample in samples]),
        items=[sample.item for sample in samples],
        bad=[bad for sample in samples for bad in sample.bad],
        bad_samples=sum(bool(sample.bad) for sample in samples),
        refused=[sample.refused for sample in samples if sample.refused is not None],
    )


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: torch would wrap its message in a worker's traceback."""

    message: str


@dataclass(frozen=True)
class _Ahead:
    """The frames of a sample's window as NVDEC read them, each once."""

    window: np.ndarray
    pixels: torch.Tensor | Refused


class ClipDataset(Dataset):
    """Samples by global index. `train=False`: held-out order, middle clip, centre crop, no flip, no seed.

    Evaluation takes one clip per video whatever `clips_per_video` says.
    """

    def __init__(
        self, data: DataConfig, size: int, manifest: Manifest, mixture: Mixture, seed: int, train: bool
    ) -> None:
        self.data, self.size, self.seed, self.train = data, size, seed, train
        self.manifest, self.mixture = manifest, mixture
        self._video: decode.Video | None = None  # the last one opened
        self._ahead: dict[tuple[int, str], _Ahead] = {}  # by sample and file
        self.nvdec: Nvdec | None = None
        if data.decoder == "dali":
            nvdec.check()
            self.nvdec = Nvdec(torch.cuda.current_device())

    @property
    def note(self) -> str:
        """What is drawn from, for the log."""
        return self.mixture.note

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_video": None, "_ahead": {}}  # an open decoder does not travel to workers

    def __getitem__(self, request: Request | tuple[int, Sequence[int]]) -> ClipBatch | _Failure:
        frames, indices = request
        try:
            if self.nvdec is None:
                return collate([self.sample(index, frames) for index in indices])
            samples: list[Sample] = []
            for first in range(0, len(indices), nvdec.LANES):
                part = indices[first : first + nvdec.LANES]
                self._read_ahead(part, frames)
                samples += [self.sample(index, frames) for index in part]
            return collate(samples)
        except DataError as error:
            return _Failure(str(error))

    def sample(self, index: int, frames: int) -> Sample:
        """The clip with global sample index `index`, redrawn inside its set while files are bad."""
        bad: list[tuple[str, str]] = []
        for attempt in range(TRIES):
            name, item = self._draw(index, attempt)
            ahead = self._ahead.pop((index, item.path), None)
            refused = None
            if ahead is not None and isinstance(ahead.pixels, Refused):
                ahead, refused = None, (item.path, ahead.pixels.reason)
            try:
                video = self._clip(item, index, frames, ahead)
            except BadFile as error:
                bad.append((error.path, error.reason))
                continue
            return Sample(video, index, item.label, item.path, item.kind == "image", tuple(bad), refused)
        path, reason = bad[-1]
        raise DataError(
            f"sample {index}: {TRIES} files in a row of set {name} can't be decoded, the last one {path} "
            f"({reason}); check that the set's files are there and build its manifest with --probe"
        )

    def _draw(self, index: int, attempt: int) -> tuple[str, Item]:
        """The set, and the item of it that the sample tries in its `attempt`."""
        if self.train:
            name, row = self.mixture.draw(self.seed, index // self.data.clips_per_video, attempt)
        else:
            name, row = self.mixture.held_out(index, attempt)
        return name, self.manifest.item(name, row)

    def _read_ahead(self, indices: Sequence[int], frames: int) -> None:
        """Read the videos of the samples' first tries on the GPU, into `_ahead`.

        Left to decord: files that it can't open, and later tries.
        """
        keys, windows = [], []
        for index in indices:
            item = self._draw(index, 0)[1]
            if item.kind == "image":
                continue
            try:
                total, fps = self._length(item)
            except BadFile:
                continue
            keys.append((index, item.path))
            windows.append(self._window(total, fps, index, frames))
        self._video = None
        jobs = [Job(path, np.unique(window)) for (_, path), window in zip(keys, windows, strict=True)]
        read = map(_Ahead, windows, self.nvdec.read(jobs))
        self._ahead = dict(zip(keys, read, strict=True))

    def _length(self, item: Item) -> tuple[int, float]:
        """(frames, fps) as decord says, which a probed manifest knows: opening a file takes a while."""
        if item.frames > 0 and item.fps > 0:
            return item.frames, item.fps
        video = self._open(item.path)
        return video.frames, video.fps

    def _open(self, path: str) -> decode.Video:
        if self._video is None or self._video.path != path:
            self._video = None  # close before opening: a decoder holds many frames
            self._video = decode.Video(path)
        return self._video

    def _window(self, total: int, fps: float, index: int, frames: int) -> np.ndarray:
        """Numbers of the frames that sample `index` shows of a video."""
        place = numpy_rng(self.seed, "window", index).random() if self.train else None
        return decode.clip_indices(total, decode.frame_step(fps, self.data.fps), frames, place)

    def _clip(self, item: Item, index: int, frames: int, ahead: _Ahead | None) -> torch.Tensor:
        """uint8 [3, frames, size, size]"""
        if item.kind == "image":
            pixels, back = decode.read_image(item.path)[None], None
        elif ahead is not None:
            unique, back = np.unique(ahead.window, return_inverse=True)
            pixels = ahead.pixels
        else:
            video = self._open(item.path)
            window = self._window(video.frames, video.fps, index, frames)
            unique, back = np.unique(window, return_inverse=True)
            try:
                pixels = video.read(unique)
            except BadFile:
                self._video = None  # its state is unknown
                raise
        height, width = pixels.shape[1:3]
        if self.train:
            rng = numpy_rng(self.seed, "crop", index)
            crop = transforms.random_crop(rng, height, width, self.data.crop_scale, self.data.crop_aspect)
            flip = bool(numpy_rng(self.seed, "flip", index).random() < self.data.flip)
        else:
            crop, flip = transforms.centre_crop(height, width), False
        clip = transforms.resize_clip(pixels, crop, self.size, flip).cpu()
        if item.kind == "image":
            return clip.expand(3, frames, self.size, self.size)
        return clip if len(unique) == frames else clip[:, torch.from_numpy(back)]


def build_dataset(config: RunConfig, train: bool = True) -> ClipDataset | DigitClips:
    """The training or the validation set of a run."""
    data, flag = config.data, "manifest" if train else "eval_manifest"
    path = getattr(data, flag)
    require(path is not None, f"no data.{flag}: write one with tools/build_manifest.py and name it")
    if is_made(path):
        from nextvid_mcore.data import digits_source  # it builds on this module

        return digits_source.build(config, path, train)
    manifest = Manifest.open(path)
    mixture = build_mixture(manifest, data.sets)
    return ClipDataset(data, config.model.image_size, manifest, mixture, config.train.seed, train)


def data_note(config: RunConfig) -> str:
    """What is drawn from, for the log. Raises where training or held-out clips can't be drawn."""
    note = build_dataset(config).note
    if config.eval.every and config.data.eval_manifest is not None:
        build_dataset(config, train=False)
    return note


def _unchanged(batch: ClipBatch | _Failure) -> ClipBatch | _Failure:
    return batch


def iterate(
    dataset: ClipDataset | DigitClips,
    requests: Iterable[Request | tuple[int, Sequence[int]]],
    workers: int = 0,
    prefetch: int = 2,
    timeout: float = 300.0,
    pin: bool = False,
    log: BadFileLog | None = None,
) -> Iterator[ClipBatch]:
    """The batches of `requests`, in order; `prefetch` a worker are decoded ahead.

    Closing the iterator ends its workers. A worker that dies raises in this process at once, wherever it
    is, as torch's RuntimeError that names the worker, or here as `DataError`.
    """
    log = log or LOG
    parallel = {}
    if workers:
        parallel = {
            "num_workers": workers,
            "prefetch_factor": prefetch,
            "timeout": timeout,
            "multiprocessing_context": "spawn",
            "worker_init_fn": start_worker,
        }
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        collate_fn=_unchanged,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader draws a number nobody uses: not from the global state
        **parallel,
    )
    with shield():
        batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise DataError(_explain(error, timeout)) from error
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            log.add(batch.bad)
            log.refused(batch.refused)
            yield batch
    finally:
        del batches  # joins the workers


def _explain(error: RuntimeError, timeout: float) -> str:
    text = " ".join(str(error).split())
    if "timed out" in text:
        return (
            f"no batch came from the loader within {timeout:g} s: a worker hangs in a file or the storage "
            "does not answer; more data.workers or a longer data.timeout may help"
        )
    return f"a loader worker failed: {text[:500]}"


def build_loader(
    config: RunConfig, requests: Iterable[Request | tuple[int, Sequence[int]]]
) -> Iterator[ClipBatch]:
    """`iterate` over training clips with everything taken from the configuration."""
    return iterate(
        build_dataset(config),
        requests,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        timeout=config.data.timeout,
        pin=torch.cuda.is_available(),
    )
