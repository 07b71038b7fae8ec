"""A step's micro-batches: decoded once per replica, shared inside it, with what all ranks must agree on.

The first rank of a replica (tensor rank 0 of the first pipeline stage) runs the loader and broadcasts the
uint8 clips and their sample indices over the replica. With them goes one small all-gather over all ranks:
how many samples met a bad file or one that NVDEC refuses, whether a loader failed, whether a signal asked
for the end. So every rank stops at the same step, for the same reason. Seats of their own load the same
samples; a seat whose roles see no video gets their indices alone. On GPUs all of it happens on a stream of
its own: the host waits for what the others say, and not for the last step's update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nextvid_mcore.data.guard import BadShareGuard
from nextvid_mcore.data.loader import ClipBatch
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.schedule import StagePoint


class LoaderError(RuntimeError):
    """A loader failed, here or on another rank."""


@dataclass(frozen=True)
class StepData:
    """The clips of one step of one replica."""

    batches: list[ClipBatch]
    bad: int  # samples of the step that met a bad file, over all replicas
    refused: int  # samples of the step that NVDEC refused and decord read, over all replicas
    signal: int  # the signal that some rank received, or 0
    seconds: float  # waited for


def device() -> torch.device:
    """Where collectives of this process work."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def share(batch: ClipBatch | None, clips: int, frames: int, size: int, groups: RoleGroups) -> ClipBatch:
    """The replica's first rank's batch on every rank of the replica; the others pass None."""
    replica = groups.collection.mp
    if replica.size() == 1:
        return batch
    if batch is None:
        video = torch.empty(clips, 3, frames, size, size, dtype=torch.uint8, device=device())
        numbers = torch.empty(3, clips, dtype=torch.int64, device=device())
    else:
        video = batch.video.to(device(), non_blocking=True).contiguous()
        numbers = torch.stack([batch.index, batch.label, batch.static.long()]).to(device())
    first = dist.get_global_rank(replica, 0)
    dist.broadcast(video, first, group=replica)
    dist.broadcast(numbers, first, group=replica)
    if batch is not None:
        return dataclasses.replace(batch, video=video)
    index, label, static = numbers.cpu()
    return ClipBatch(video=video, index=index, label=label, static=static.bool(), items=[])


def blank(request: tuple[int, Sequence[int]]) -> ClipBatch:
    """A batch without pixels, [B, 3, T, 0, 0]: indices for a seat that sees no video."""
    frames, indices = request
    clips = len(indices)
    return ClipBatch(
        video=torch.empty(clips, 3, frames, 0, 0, dtype=torch.uint8),
        index=torch.tensor(indices, dtype=torch.int64),
        label=torch.full((clips,), -1),
        static=torch.zeros(clips, dtype=torch.bool),
        items=[""] * clips,
    )


class Feed:
    """Hands out steps in order.

    Args:
        loader: this replica's micro-batches, on the host; in a seat that sees video only on its replicas'
            first ranks.
        size: height and width of a frame.
    """

    def __init__(
        self, loader: Iterator[ClipBatch] | None, seats: Seats, guard: BadShareGuard, size: int
    ) -> None:
        self._loader, self._groups, self._guard, self._size = loader, seats.home, guard, size
        self._placement, self._seat = seats.placement, seats.mine[0]
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._shared, self._counts = self._seat.sees_video, "student" in self._seat.roles
        first = self._groups.collection.mp.rank() == 0
        assert (loader is not None) == (first or not self._shared)

    def next(self, point: StagePoint, signal: int) -> StepData:
        """This seat's micro-batches of the step at `point`, the next one.

        `signal`: what this rank received. Raises LoaderError on all ranks, DataError when too many files
        are bad.
        """
        begin = time.perf_counter()
        count = self._placement.encoder.layout.micro_batches(point.batch, point.micro_batch)
        clips, frames = self._placement.clips(self._seat, point.micro_batch), point.stage.frames
        mine: list[ClipBatch] = []
        error: Exception | None = None
        try:
            for _ in range(count if self._loader is not None else 0):
                mine.append(next(self._loader))
        except Exception as failure:  # said on this rank below, after the others know
            error = failure
        files = [entry for batch in mine for entry in batch.bad]
        # every seat meets the same bad files: they count once
        bad = sum(batch.bad_samples for batch in mine) if self._counts else 0
        refused = sum(len(batch.refused) for batch in mine) if self._counts else 0
        with self._beside():
            bad, refused, failed, signal = self._agree(bad, refused, error is not None, signal)
        if error is not None:
            raise error
        if failed:
            raise LoaderError("the loader of another rank failed; its message names the cause")
        total = count * clips * self._groups.layout.data
        self._guard.update(total, bad, files)
        batches = mine
        if self._shared:
            with self._beside():
                batches = [
                    share(mine[i] if mine else None, clips, frames, self._size, self._groups)
                    for i in range(count)
                ]
            for batch in batches:
                if batch.video.is_cuda:  # made there, and read on the step's own stream
                    batch.video.record_stream(torch.cuda.current_stream())
        return StepData(batches, bad, refused, signal, time.perf_counter() - begin)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """What follows waits for what is done inside; that waits for nothing before it."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _agree(self, bad: int, refused: int, failed: bool, signal: int) -> tuple[int, int, bool, int]:
        """(sum of bad, sum of refused, any failed, the highest signal) over all ranks."""
        if dist.get_world_size() == 1:
            return bad, refused, failed, signal
        mine = torch.tensor([bad, refused, int(failed), signal], dtype=torch.int64, device=device())
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        table = torch.stack(rows).cpu()
        bad, refused = table[:, :2].sum(0).tolist()
        return bad, refused, bool(table[:, 2].any()), int(table[:, 3].max())
