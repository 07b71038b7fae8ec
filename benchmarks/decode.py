"""Clips per second, CPU and GPU that decoding takes, by decoder and size of video.

    python benchmarks/make_videos.py --out data/bench
    python benchmarks/decode.py data/bench --rate 40

Measured is the loader itself (nextvid_mcore/data/loader.py): worker processes that read, decode, crop and
scale 16 frames at 4 a second to 256 x 256, each file of the folder being a set of its own. Per decoder one
pool of workers serves all files; what it had begun when the file changes is not counted.

Printed are clips/s, the share of all cores that this process and its workers used, the GPU's and its video
engines' utilisation (nvidia-smi), the memory the workers hold on the GPU, and, for --rate clips/s: the
cores that would take, and the workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import least

if TYPE_CHECKING:
    from nextvid_mcore.config import RunConfig
    from nextvid_mcore.data import ClipBatch


ROUNDS = 6  # of a profile's figure
BATCH = {"decord": 2, "dali": 8}  # clips of a request; dali decodes eight at a time


@dataclass(frozen=True)
class Row:
    """One decoder on one kind of video. cpu: seconds of all cores a clip. nan: without a GPU."""

    video: str
    decoder: str
    workers: int
    rate: float
    cpu: float
    gpu: float
    engine: float
    gib: float
    refused: float
    difference: float


class Files:
    """Data set for `iterate`: requests (name, frames, indices), each file of `folder` under its name.

    A class of this module: worker processes import it again.
    """

    def __init__(self, sets: dict) -> None:
        self.sets = sets

    def __getitem__(self, request: tuple[str, int, tuple[int, ...]]) -> ClipBatch:
        name, frames, indices = request
        return self.sets[name][frames, indices]


class Utilisation:
    """Means of nvidia-smi's figures (GPU, decoders) since `start`."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, float]] = []
        command = ["nvidia-smi", "--query-gpu=utilization.gpu,utilization.decoder", "-i", "0", "-lms", "200"]
        try:
            self._process = subprocess.Popen(
                [*command, "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True
            )
        except OSError:
            self._process = None  # no GPU
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            try:
                gpu, engine = map(float, line.split(","))
            except ValueError:
                continue
            self._lines.append((gpu / 100, engine / 100))

    def start(self) -> None:
        self._lines.clear()

    def mean(self) -> tuple[float, float]:
        lines = list(self._lines)
        if not lines:
            return float("nan"), float("nan")
        return sum(gpu for gpu, _ in lines) / len(lines), sum(engine for _, engine in lines) / len(lines)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()


def configure(folder: Path, video: Path, decoder: str) -> RunConfig:
    """vit_g's data settings on a probed manifest of this one file."""
    from nextvid_mcore import recipes
    from nextvid_mcore.data import decode
    from nextvid_mcore.data.manifest import Item, SetWriter

    where = folder / video.stem
    if not where.exists():
        with SetWriter(where, "s") as writer:
            writer.add([Item(str(video.resolve()), "video", 0, *decode.probe(str(video), "video"))])
    config = recipes.get("vit_g")
    data = dataclasses.replace(config.data, manifest=str(where), sets=(), decoder=decoder)
    return dataclasses.replace(config, data=data)


def readable(folder: Path) -> list[Path]:
    """The videos of a folder, the smallest file first; what can't be opened is named and left out."""
    from nextvid_mcore.data import decode

    videos = []
    for path in sorted(folder.glob("*.mp4"), key=lambda path: path.stat().st_size):
        try:
            decode.probe(str(path), "video")
        except decode.BadFile as error:
            print(f"left out: {error}", flush=True)
            continue
        videos.append(path)
    if not videos:
        raise SystemExit(f"no .mp4 file to read in {folder}; write some with benchmarks/make_videos.py")
    return videos


def cpu_seconds() -> float:
    """Of this process and its workers."""
    import psutil

    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def gib_in_use() -> float:
    import torch

    if not torch.cuda.is_available():
        return float("nan")
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def measure(
    args: argparse.Namespace, decoder: str, workers: int, folder: Path, smi: Utilisation
) -> Iterator[Row]:
    """All videos by one decoder with one pool of workers."""
    from nextvid_mcore.data.loader import build_dataset, iterate

    sets = {v.stem: build_dataset(configure(folder, v, decoder)) for v in args.videos}
    exact = {v.stem: build_dataset(configure(folder, v, "decord")) for v in args.videos}
    before, current = gib_in_use(), args.videos[0].stem
    clips_each = BATCH[decoder]

    def requests() -> Iterator[tuple[str, int, tuple[int, ...]]]:
        for first in itertools.count(0, clips_each):
            yield current, args.frames, tuple(range(first, first + clips_each))

    batches = iterate(Files(sets), requests(), workers, prefetch=2)
    for video in args.videos:
        current = video.stem
        checked = False
        for _ in range(3 * workers):  # two that were asked for before, one to begin with
            batch = next(batches)
            if not checked and batch.items[0] == str(video.resolve()):
                checked, wanted = True, exact[current].sample(int(batch.index[0]), args.frames).video
                difference = float((batch.video[0].float() - wanted.float()).abs().mean())
        smi.start()
        clips = refused = 0
        start, cpu = time.perf_counter(), cpu_seconds()
        while time.perf_counter() - start < args.seconds:
            batch = next(batches)
            clips += len(batch.index)
            refused += len(batch.refused)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        gpu, engine = smi.mean()
        gib = gib_in_use() - before
        share = refused / clips
        yield Row(
            current, decoder, workers, clips / seconds, cpu / clips, gpu, engine, gib, share, difference
        )
    batches.close()


def profile(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from nextvid_mcore.data import decode, nvdec

    nvdec.check()
    reader = nvdec.Nvdec(torch.cuda.current_device())
    kinds = [(what, count) for what in ("first frame", "clip") for count in (1, nvdec.LANES)]
    heads = " ".join(f"{f'{what} x {count}':>22}" for what, count in kinds)
    print(f"{'ms a file (of it CPU)':<22} {'blocks':>9} {heads}", flush=True)
    for path in args.videos:
        video = decode.Video(str(path))
        height, width = video.read(np.zeros(1, np.int64)).shape[1:3]
        whole = "whole" if height % 16 == width % 16 == 0 else "cut"
        figures = []
        for what, count in kinds:
            step = decode.frame_step(video.fps, 4) if what == "clip" else 1
            frames = args.frames if what == "clip" else 1
            window = decode.clip_indices(video.frames, step, frames, 0.5 if what == "clip" else 0.0)
            jobs, took = [nvdec.Job(str(path), np.unique(window))] * count, []
            for _ in range(2 + ROUNDS):  # the first two make decoders and reserve memory
                begin, cpu = time.perf_counter(), time.process_time()
                read = reader.read(jobs)
                took.append((time.perf_counter() - begin, time.process_time() - cpu))
                if refused := [clip.reason for clip in read if isinstance(clip, nvdec.Refused)]:
                    raise SystemExit(f"{path}: {refused[0]}")
            seconds, cpu = np.mean(took[2:], 0) / count
            figures.append(f"{1e3 * seconds:.1f} ({1e3 * cpu:.1f})")
        print(f"{path.stem:<22} {whole:>9} " + " ".join(f"{each:>22}" for each in figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of videos; make_videos.py writes one")
    parser.add_argument("--decoders", nargs="+", default=["decord", "dali"], choices=["decord", "dali"])
    parser.add_argument("--workers", type=least(1), default=16, help="decord's processes")
    parser.add_argument("--dali-workers", type=least(1), nargs="+", default=[2])
    parser.add_argument("--frames", type=least(1), default=16)
    parser.add_argument("--seconds", type=least(0, float), default=5.0, help="per figure")
    parser.add_argument("--rate", type=least(0, float), nargs="+", default=[40.0], help="clips/s to feed")
    parser.add_argument("--profile", action="store_true", help="NVDEC alone, what a file costs in parts")
    args = parser.parse_args()

    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone
    import torch

    from nextvid_mcore.config import ConfigError

    args.videos = readable(args.folder)
    cores = len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{cores} cores, {name}, torch {torch.__version__}; {args.frames} frames to 256 x 256", flush=True)
    if args.profile:
        return profile(args)
    heads = [f"cores for {rate:g}/s" for rate in args.rate]
    print(
        f"{'video':<14} {'decoder':<7} {'procs':>5} {'clips/s':>8} {'CPU':>5} {'GPU':>5} {'NVDEC':>6} "
        f"{'GiB':>5} {'refused':>7} {'diff':>5} {'ms CPU':>7} " + " ".join(f"{head:>15}" for head in heads),
        flush=True,
    )
    plans = [("decord", args.workers)] if "decord" in args.decoders else []
    plans += [("dali", count) for count in args.dali_workers if "dali" in args.decoders]
    smi = Utilisation()
    with tempfile.TemporaryDirectory() as scratch:
        for decoder, workers in plans:
            try:
                for row in measure(args, decoder, workers, Path(scratch), smi):
                    show(row, cores, args.rate)
            except ConfigError as error:
                print(f"{decoder}: {error}", flush=True)
    smi.close()
    print(
        "CPU: share of all cores. NVDEC: share of all video engines. diff: mean absolute difference from "
        "decord's pixels of one clip,\nof 255. cores: CPU time of a clip times the rate; in brackets the "
        "processes, at the rate of one here."
    )


def show(row: Row, cores: int, rates: list[float]) -> None:
    needed = [f"{rate * row.cpu:.1f} ({rate / row.rate * row.workers:.1f})" for rate in rates]
    cpu = row.rate * row.cpu / cores
    print(
        f"{row.video:<14} {row.decoder:<7} {row.workers:>5} {row.rate:>8.1f} {cpu:>5.0%} {row.gpu:>5.0%} "
        f"{row.engine:>6.0%} {row.gib:>5.1f} {row.refused:>7.0%} {row.difference:>5.2f} "
        f"{1e3 * row.cpu:>7.1f} " + " ".join(f"{each:>15}" for each in needed),
        flush=True,
    )


if __name__ == "__main__":
    main()
