"""A training run's rate from video files against its rate on clips that already lie on the device.

    python benchmarks/make_videos.py --out data/bench
    python benchmarks/feed.py data/bench --videos "454x256*" -- vit_g --model.backend te --train.micro-batch 8

What follows `--` are settings as for pretraining. Both runs take the real step (training/step.py) with
the target's latents on the device; the second one reads its clips as training does, through the loader's
processes and training/feed.py, from a probed manifest of the files. As many steps as batches may wait in
the loader's queues are taken before the clock starts: a loader that is too slow has no head start.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common import Bench

    from nextvid_mcore.config import RunConfig


@dataclass(frozen=True)
class Fed:
    """A run from files. wait: seconds of a step until its clips were there. cpu: share of all cores."""

    seconds: float
    wait: float
    cpu: float
    gib: float
    refused: int


def configure(args: argparse.Namespace, folder: Path, world: int) -> RunConfig:
    """The settings after `--`, one micro-batch a replica in a step, on the benchmark's files."""
    from nextvid_mcore import cli
    from nextvid_mcore.data import decode
    from nextvid_mcore.data.manifest import Item, SetWriter

    config, _ = cli.parse([*args.settings, "--target.kind", "pixels", "--dry-run"])
    videos = sorted(args.folder.glob(args.videos))
    if not videos:
        raise SystemExit(f"no {args.videos} in {args.folder}; write files with benchmarks/make_videos.py")
    if not folder.exists():
        with SetWriter(folder, "s") as writer:
            for path in videos:
                writer.add([Item(str(path.resolve()), "video", 0, *decode.probe(str(path), "video"))])
    from nextvid_mcore.parallel.placement import resolve_placement

    replicas = resolve_placement(config, world).encoder.layout.data
    batch = config.train.micro_batch * replicas
    stage = dataclasses.replace(config.stages[0], batch=batch, steps=10**6)  # more than are taken
    data = dataclasses.replace(config.data, manifest=str(folder), sets=())
    train = dataclasses.replace(config.train, global_batch=None)
    return dataclasses.replace(config, stages=(stage,), data=data, train=train)


def from_files(bench: Bench, config: RunConfig, seconds: float, resident: float) -> Fed:
    """The same step on clips that the loader brings, for about `seconds`."""
    from decode import cpu_seconds, gib_in_use

    from nextvid_mcore.data.guard import BadShareGuard
    from nextvid_mcore.data.loader import build_loader
    from nextvid_mcore.data.sampler import rank_batches
    from nextvid_mcore.schedule import Schedule
    from nextvid_mcore.training.feed import Feed

    seats, point = bench.step.seats, bench.point
    home, data = seats.home, config.data
    requests = rank_batches(
        Schedule(config), 0, home.data_rank, home.layout.data, bench.placement.clips(seats.mine[0])
    )
    before = gib_in_use()
    loads = home.collection.mp.rank() == 0
    loader = build_loader(config, requests) if loads else None
    feed = Feed(loader, seats, BadShareGuard(data.max_bad_share, data.bad_window), config.model.image_size)
    count = home.layout.micro_batches(point.batch, config.train.micro_batch)
    refused, times, waits = 0, [], []
    ahead = data.workers * data.prefetch + 2
    for number in range(ahead + max(5, round(seconds / resident))):
        if number == ahead:
            start, cpu = time.perf_counter(), cpu_seconds()
        begin = time.perf_counter()
        batch = feed.next(count, point.stage.frames, 0)
        bench.step.run(point, batch.batches)
        bench.synchronize()
        if number >= ahead:
            times.append(time.perf_counter() - begin)
            waits.append(batch.seconds)
            refused += batch.refused
    passed = time.perf_counter() - start
    share = (cpu_seconds() - cpu) / passed / len(os.sched_getaffinity(0))
    held = gib_in_use() - before
    if loader is not None:
        loader.close()
    return Fed(passed / len(times), sum(waits) / len(waits), share, held, refused)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of videos; make_videos.py writes one")
    parser.add_argument("--videos", default="*.mp4", help="which of its files")
    parser.add_argument("--decoders", nargs="+", default=["decord", "dali"], choices=["decord", "dali"])
    parser.add_argument("--workers", type=int, default=16, help="decord's processes")
    parser.add_argument("--dali-workers", type=int, default=2)
    parser.add_argument("--prefetch", type=int, default=1, help="batches a process decodes ahead")
    parser.add_argument("--seconds", type=float, default=15.0, help="per figure")
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
    from common import Bench  # and puts the clone on the path

    from nextvid_mcore.parallel.groups import init_distributed

    while args.after is not None and not args.after.exists():
        time.sleep(0.2)
    init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    config = configure(args, folder, world)
    bench = Bench(config)
    resident = bench.measure(max(3, round(args.seconds / 3)), 3)
    clips = bench.point.batch / world
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cores = len(os.sched_getaffinity(0))

    def show(case: str, seconds: float, rest: str = "") -> None:
        if rank == 0:
            rate, kept = clips / seconds, resident.seconds / seconds
            print(f"{case:<28} {rate:>11.2f} {1e3 * seconds:>8.1f} {kept:>6.1%} {rest}", flush=True)

    if rank == 0:
        print(
            f"\n{config.recipe}, {config.stages[0].frames} frames, tau {config.stages[0].tau_samples}, "
            f"micro-batch {config.train.micro_batch}, {config.train.precision}\n{' '.join(args.settings)}\n"
            f"{world} x {name}, {cores} cores, torch {torch.__version__}, files {args.videos}, "
            f"reserved {resident.gib:.1f} GiB\n"
            f"{'clips from':<28} {'clips/s/GPU':>11} {'ms':>8} {'kept':>6} "
            f"{'wait ms':>8} {'CPU':>5} {'GiB of workers':>15} {'refused':>8}"
        )
    show("the device", resident.seconds)
    for decoder in args.decoders:
        workers = args.workers if decoder == "decord" else args.dali_workers
        data = dataclasses.replace(config.data, decoder=decoder, workers=workers, prefetch=args.prefetch)
        try:
            fed = from_files(bench, dataclasses.replace(config, data=data), args.seconds, resident.seconds)
        except Exception:  # one decoder's failure leaves the other's figures
            traceback.print_exc()
            continue
        rest = f"{1e3 * fed.wait:>8.1f} {fed.cpu:>5.0%} {fed.gib:>15.1f} {fed.refused:>8}"
        show(f"files, {decoder}, {workers} processes", fed.seconds, rest)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
