"""A training run's rate from video files against its rate on clips that already lie on the device.

    python benchmarks/make_videos.py --out data/bench
    python benchmarks/feed.py data/bench --videos "454x256*" -- vit_g --train.micro-batch 16

What follows `--` are settings as for pretraining. Both runs take the real step (training/step.py), with
random weights and with latents of the target's size that lie on the device; the second one reads its clips
as training does, through the loader's processes and training/feed.py, from a probed manifest of the files.
As many batches as may wait in the loader's queues are taken before the clock starts: a loader that is too
slow has no head start. Its processes start while the step is built and compiled. Lines come as it goes, so
a run that is cut short has said what it saw.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import least

if TYPE_CHECKING:
    from common import Bench

    from nextvid_mcore.config import RunConfig
    from nextvid_mcore.data import ClipBatch
    from nextvid_mcore.parallel.placement import Placement

START = time.perf_counter()


@dataclass(frozen=True)
class Fed:
    """A run from files. wait: seconds of a step until its clips were there. cpu: share of all cores."""

    seconds: float
    wait: float
    cpu: float
    gib: float
    refused: int


def say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{time.perf_counter() - START:>6.1f} s  {text}", flush=True)


def configure(args: argparse.Namespace, folder: Path, world: int) -> RunConfig:
    """The settings after `--`, `--accumulate` micro-batches a replica in a step, on the benchmark's files."""
    from nextvid_mcore import cli
    from nextvid_mcore.data import decode
    from nextvid_mcore.data.manifest import Item, SetWriter
    from nextvid_mcore.parallel.placement import resolve_placement

    config, _ = cli.parse([*args.settings, "--target.kind", "pixels", "--dry-run"])
    videos = sorted(args.folder.glob(args.videos))
    if not videos:
        raise SystemExit(f"no {args.videos} in {args.folder}; write files with benchmarks/make_videos.py")
    if not folder.exists():
        with SetWriter(folder, "s") as writer:
            for path in videos:
                try:
                    seen = decode.probe(str(path), "video")
                except decode.BadFile as error:
                    raise SystemExit(f"{error}; remove it, or leave it out with --videos") from None
                writer.add([Item(str(path.resolve()), "video", 0, *seen)])
    replicas = resolve_placement(config, world).encoder.layout.data
    batch = config.micro_batch(config.stages[0]) * replicas * args.accumulate
    stage = dataclasses.replace(config.stages[0], batch=batch, steps=10**6)  # more than are taken
    data = dataclasses.replace(config.data, manifest=str(folder), sets=())
    train = dataclasses.replace(config.train, global_batch=None)
    kind = "va_vae" if config.model.patch_size == 16 else "pixels"  # of its latents the size alone counts
    target = dataclasses.replace(config.target, kind=kind)
    return dataclasses.replace(config, stages=(stage,), data=data, train=train, target=target)


class Files:
    """The loader of this rank, if it has one. Its processes start at once, beside what this one does."""

    def __init__(self, config: RunConfig, placement: Placement) -> None:
        import torch
        from decode import gib_in_use

        from nextvid_mcore.data.loader import build_loader
        from nextvid_mcore.data.sampler import rank_batches
        from nextvid_mcore.parallel.seats import build_seats
        from nextvid_mcore.schedule import Schedule

        seats = build_seats(placement)
        home = seats.home
        clips = placement.clips(seats.mine[0], config.micro_batch(config.stages[0]))
        of_rank = (home.data_rank, home.layout.data, lambda _: clips)
        self.requests = functools.partial(rank_batches, Schedule(config), 0, *of_rank)
        self.data, self._gib = config.data, gib_in_use()
        self.loader = build_loader(config, self.requests()) if home.collection.mp.rank() == 0 else None
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def first() -> ClipBatch:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins with the first one
            return next(self.loader)

        self._thread = ThreadPoolExecutor(1)  # lives on: workers end with the thread that started them
        self._first = self._thread.submit(first) if self.loader is not None else None

    def batches(self) -> Iterator[ClipBatch]:
        yield self._first.result()
        yield from self.loader

    def gib(self) -> float:
        """What the processes took of the GPU's memory, if nobody else took or gave any meanwhile."""
        from decode import gib_in_use

        return gib_in_use() - self._gib

    def close(self) -> None:
        if self.loader is not None:
            self._first.result()
            self.loader.close()
        self._thread.shutdown()


def from_files(bench: Bench, config: RunConfig, files: Files, seconds: float, resident: float) -> Fed:
    """The same step on clips that the loader brings, for about `seconds`."""
    from decode import cpu_seconds

    from nextvid_mcore.data.guard import BadShareGuard
    from nextvid_mcore.training.feed import Feed
    from nextvid_mcore.training.microbatch import Outline

    seats, point, data = bench.step.seats, bench.point, files.data
    feed = Feed(
        files.batches() if files.loader is not None else None,
        seats,
        BadShareGuard(data.max_bad_share, data.bad_window),
        config.model.image_size,
    )
    count = bench.placement.encoder.layout.micro_batches(point.batch, point.micro_batch)
    coming = itertools.islice(files.requests(), count, None, count)  # of every later step the first
    refused, times, waits = 0, [], []
    ahead = math.ceil((data.workers * data.prefetch + 2) / count)
    said = time.perf_counter()
    for number in range(ahead + max(5, round(seconds / resident))):
        if number == ahead:
            bench.synchronize()
            start, cpu = time.perf_counter(), cpu_seconds()
        begin = time.perf_counter()
        batch = feed.next(point, 0)
        bench.step.run(point, batch.batches, Outline(*next(coming), point.stage.tau_samples))
        times.append(time.perf_counter() - begin)
        waits.append(batch.seconds)
        refused += batch.refused if number >= ahead else 0
        if time.perf_counter() - said > 2:
            said = time.perf_counter()
            kind = "from the queues" if number < ahead else "counted"
            say(f"step {number} ({kind}): {1e3 * times[-1]:.1f} ms, of it {1e3 * waits[-1]:.1f} waited")
    bench.synchronize()
    passed = time.perf_counter() - start
    share = (cpu_seconds() - cpu) / passed / len(os.sched_getaffinity(0))
    counted = len(times) - ahead
    return Fed(passed / counted, sum(waits[ahead:]) / counted, share, files.gib(), refused)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of videos; make_videos.py writes one")
    parser.add_argument("--videos", default="*.mp4", help="which of its files")
    parser.add_argument("--decoders", nargs="+", default=["decord", "dali"], choices=["decord", "dali"])
    parser.add_argument("--workers", type=least(1), default=12, help="decord's processes")
    parser.add_argument("--dali-workers", type=least(1), default=2)
    parser.add_argument("--prefetch", type=least(1), default=1, help="batches a process decodes ahead")
    parser.add_argument("--accumulate", type=least(1), default=1, help="micro-batches of a step")
    parser.add_argument("--warmup", type=least(0), default=4, help="steps that compile and record")
    parser.add_argument(
        "--seconds", type=least(0, float), default=8.0, help="of files; a third of it on the device"
    )
    parser.add_argument("--after", type=Path, help="import, then wait for this file before using the GPU")
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:place])
    args.settings = words[place + 1 :] or ["vit_g"]
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch) / "manifest")


def measure(args: argparse.Namespace, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from common import Bench, check, quick_start  # and puts the clone on the path

    from nextvid_mcore import cli
    from nextvid_mcore.config import ConfigError
    from nextvid_mcore.parallel.groups import init_distributed
    from nextvid_mcore.parallel.placement import resolve_placement

    say("imported")
    while args.after is not None and not args.after.exists():
        time.sleep(0.2)
    init_distributed()
    world = dist.get_world_size()
    try:
        config = configure(args, folder, world)
        check(config, world)
    except ConfigError as error:
        cli.fail(error)
    placement = resolve_placement(config, world)

    def start(decoder: str) -> Files:
        workers = args.workers if decoder == "decord" else args.dali_workers
        data = dataclasses.replace(config.data, decoder=decoder, workers=workers, prefetch=args.prefetch)
        return Files(dataclasses.replace(config, data=data), placement)

    files: Files | None = start(args.decoders[0])
    with quick_start():
        bench = Bench(config)
    bench.synchronize()
    say("built; compiles and records")
    bench.measure(args.warmup, 0)
    say(f"{args.warmup} steps taken")
    resident = bench.measure(max(3, round(args.seconds / 3 / bench.measure(1, 0).seconds)), 0)
    clips, cores = bench.point.batch / world, len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    def row(case: str, seconds: float, rest: str = "") -> str:
        rate, kept = clips / seconds, resident.seconds / seconds
        return f"{case:<28} {rate:>11.2f} {1e3 * seconds:>8.1f} {kept:>6.1%} {rest}"

    rows = [row("the device", resident.seconds)]
    say(rows[0])
    for decoder in args.decoders:
        try:
            files = files or start(decoder)
            fed = from_files(bench, config, files, args.seconds, resident.seconds)
        except Exception:  # one decoder's failure leaves the other's figures
            traceback.print_exc()
            continue
        else:
            rest = f"{1e3 * fed.wait:>8.1f} {fed.cpu:>5.0%} {fed.gib:>15.1f} {fed.refused:>8}"
            rows.append(row(f"files, {decoder}, {files.data.workers} processes", fed.seconds, rest))
            say(rows[-1])
        finally:
            with contextlib.suppress(Exception):
                files.close()
            files = None
    if dist.get_rank() == 0:
        print(
            f"\n{config.recipe}, {config.stages[0].frames} frames, tau {config.stages[0].tau_samples}, "
            f"{args.accumulate} x {config.micro_batch(config.stages[0])} clips a step, "
            f"{config.train.precision}\n"
            f"{' '.join(args.settings)}\n"
            f"{world} x {name}, {cores} cores, torch {torch.__version__}, files {args.videos}, "
            f"reserved {resident.gib:.1f} GiB\n"
            f"{'clips from':<28} {'clips/s/GPU':>11} {'ms':>8} {'kept':>6} "
            f"{'wait ms':>8} {'CPU':>5} {'GiB of workers':>15} {'refused':>8}"
        )
        print("\n".join(rows), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
