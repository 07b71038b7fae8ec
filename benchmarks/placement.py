# ruff: noqa: E402 (the clock starts before anything heavy is imported)
"""Colocated roles against groups of their own: clips per second per GPU, and who waits.

    torchrun --nproc-per-node 4 --max-restarts 20 benchmarks/placement.py vit_l vit_g --tau 1 4 --out FILE
    torchrun --nproc-per-node 2 benchmarks/placement.py tiny --split "--parallel.placement two-groups"

A case is a recipe in a placement, measured for one tau after the other: the real training step on clips and
latents that lie on the device (64 channels, as VA-VAE's), from weights drawn there. A placement is given as
settings of the command line; without --split those that fit the number of ranks, the most telling first.
Results go to FILE, a line a case and tau. A case that fails (out of memory, most often) or lasts over --limit
seconds ends all processes, with everyone's stack; torchrun's --max-restarts, or the same command again, goes
on with the next one. No case is begun after --seconds.

Columns. ratio: to the first case of the same recipe and tau, colocated data parallelism launched kernel by
kernel, as separate groups are (they can't be recorded as CUDA graphs). ceiling: from FLOPs alone, the ratio
if every FLOP took the same time and ranks waited for lack of work only; no bound where a split takes slow
work from the heaviest rank. expected: FLOPs of narrow networks take longer (parallel/balance.py), and the
chain has to fill and to drain; of it: ratio / expected. idle: share of a step that a seat's ranks spend in
exchanges with other seats, mostly waiting: sends and receives of the schedule, the reference's weights, the
first reduction after the schedule.
"""

from __future__ import annotations

import time

START = time.time()

import argparse
import dataclasses
import faulthandler
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import least
from common import Bench, quick_start
from stopwatch import watch_exchanges
from world import join, leave

from nextvid_mcore import cli, pretrain, recipes
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.parallel.balance import balance
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.schedule import Schedule

TWO, THREE = "--parallel.placement two-groups", "--parallel.placement three-groups"
GENERATOR = "--parallel.reference generator"
DIRECT, BRIDGE = "--parallel.edge direct", "--parallel.edge bridge"
EAGER, RECORDED = "--train.cuda-graphs off", "--train.cuda-graphs on"
ANY_BATCH = math.lcm(*range(1, 65))  # any number of replicas can share it


def say(what: str) -> None:
    """A line with the seconds since this process began, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.time() - START:7.1f} s  {what}", file=sys.stderr, flush=True)


def splits(world: int) -> list[str]:
    """Placements to try, those first that answer the most. Separate groups are never recorded."""
    found, half = [EAGER], f"--parallel.generator.data {world // 2} " if world > 2 else ""
    if torch.cuda.is_available():
        found.append(RECORDED)
    if world >= 2:
        found.append(f"{TWO} {half}{GENERATOR} {DIRECT}")
        found.append(f"{TWO} {half}{GENERATOR} {BRIDGE}")
    if world == 2:
        found.append(f"{TWO} {DIRECT}")
    if world >= 4:
        quarter = world // 4
        found.append(f"{TWO} --parallel.generator.data {quarter} {DIRECT}")
        shares = f"--parallel.predictor.data {quarter} --parallel.decoder.data {quarter}"
        found.append(f"{THREE} {shares} {GENERATOR} {DIRECT}")
    if world % 2 == 0:
        found.append(f"--parallel.encoder.tensor 2 --parallel.sequence {EAGER}")
    if world >= 4:
        found.append(f"{TWO} --parallel.encoder.pipeline 2 {half}{DIRECT}")
    return found


def configure(args: argparse.Namespace, recipe: str, split: str, world: int) -> RunConfig:
    """A run whose stages differ in tau alone."""
    line = [recipe, "--dry-run", "--train.micro-batch", str(args.micro_batch), *split.split()]
    config, _ = cli.parse(line)
    stages = tuple(
        dataclasses.replace(
            config.stages[0],
            name=f"tau {tau}",
            steps=1,
            frames=args.frames or config.stages[0].frames,
            tau_samples=tau,
            batch=ANY_BATCH * args.micro_batch,
        )
        for tau in args.tau
    )
    config = dataclasses.replace(
        config,
        stages=stages,
        model=dataclasses.replace(config.model, backend=args.backend),
        train=dataclasses.replace(config.train, precision=args.precision),
        parallel=dataclasses.replace(config.parallel, recompute=args.recompute),
    )
    # The same number of clips per GPU and step in every placement, or the next above that can be shared.
    wave = args.micro_batch * resolve_placement(config, world).encoder.layout.data
    batch = max(round(args.micro_batch * args.micro_batches * world / wave), 1) * wave
    return dataclasses.replace(config, stages=tuple(dataclasses.replace(s, batch=batch) for s in stages))


def run_case(config: RunConfig, steps: int, warmup: int) -> Iterator[dict[str, Any]]:
    """Measure one placement, stage by stage; the same on every rank."""
    with quick_start():
        bench = Bench(config)
    watch = watch_exchanges(bench)
    say("  built")
    for number, stage in enumerate(config.stages):
        bench.point = Schedule(config).at(number)
        measured = bench.measure(steps, warmup, ready=watch.spans.clear)
        mine = {
            "seat": bench.step.seats.mine[-1].name,
            "gib": measured.gib,
            "idle": watch.seconds() / steps / measured.seconds,
        }
        watch.spans.clear()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        seats = {}
        for name in dict.fromkeys(rank["seat"] for rank in ranks):
            here = [rank for rank in ranks if rank["seat"] == name]
            seats[name] = {
                "ranks": len(here),
                "idle": sum(rank["idle"] for rank in here) / len(here),
                "gib": max(rank["gib"] for rank in here),
            }
        ideal = balance(config, bench.placement, stage, target=False, narrow=0.0)
        expected = balance(config, bench.placement, stage, target=False)
        yield {
            "rate": bench.point.batch / measured.seconds / len(ranks),
            "milliseconds": 1e3 * measured.seconds,
            "loss": measured.loss,
            "micro_batches": len(bench.clips),
            "seats": seats,
            "ceiling": ideal.ceiling,
            "expected": expected.speed,
        }
    bench.step.close()


class Results:
    """A line a case, in a file that a restarted process reads: `begun`, then a result or an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                row = json.loads(line)
                kept = found.get(row["case"], {})
                if "rate" not in kept and "error" not in kept:  # the first word on a case is the last
                    found[row["case"]] = row
        return found

    def add(self, case: str, **row: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"case": case, **row}) + "\n")


def in_time(results: Results, seconds: float | None) -> bool:
    """Whether another case may begin, by rank 0's clock; restarts count."""
    if seconds is None:
        return True
    begun = [results.read().get("", {}).get("at", START) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(begun, src=0)
    late = [time.time() - begun[0] > seconds if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(late, src=0)
    return not late[0]


def main() -> int:
    args = parse()
    world, rank = int(os.environ.get("WORLD_SIZE", "0")), os.environ.get("RANK")
    if not world:
        print("start it with torchrun --nproc-per-node N", file=sys.stderr)
        return 2
    pretrain.quiet()
    say("imported")
    results = Results(args.out)
    setups = [(recipe, split) for split in args.split or splits(world) for recipe in args.recipes]
    done = results.read()  # before rank 0 writes
    if rank == "0" and "" not in done:
        results.add("", at=START)
    for number, (recipe, split) in enumerate(setups):
        names = [case_name(recipe, tau, split) for tau in args.tau]
        rows = [done.get(name, {}) for name in names]
        if all("rate" in row or "error" in row for row in rows):
            continue
        if any(rows):  # begun before a restart, and not finished
            for name in names if rank == "0" else ():
                results.add(name, error="ended without a word")
            continue
        join(number)
        if not in_time(results, args.seconds):
            for name in names if rank == "0" else ():
                results.add(name, error=f"not begun within {args.seconds:g} s")
            leave()
            continue
        say(f"begins: {recipe} {short(split)}")
        for name in names if rank == "0" else ():
            results.add(name, begun=True)
        try:
            config = configure(args, recipe, split, world)
        except ConfigError as error:  # on every rank
            for name in names if rank == "0" else ():
                results.add(name, error=str(error))
            leave()
            continue
        faulthandler.dump_traceback_later(args.limit, exit=True)
        try:
            for name, found in zip(names, run_case(config, args.steps, args.warmup), strict=True):
                if rank == "0":
                    results.add(name, **found)
                say(f"  {name}: {found['rate']:.2f} clips/s/GPU")
        except Exception as error:
            traceback.print_exc()
            for name in names:
                results.add(name, error=f"rank {rank}: {str(error).splitlines()[0][:120]}")
            os._exit(1)  # the launcher ends the others
        faulthandler.cancel_dump_traceback_later()
        leave()
    if rank == "0":
        report(args, world, setups, results.read())
    return 0


def case_name(recipe: str, tau: int, split: str) -> str:
    return f"{recipe} tau {tau} {split}".strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", choices=recipes.names(), metavar="RECIPE")
    parser.add_argument("--tau", nargs="+", type=least(1), default=[1, 4])
    parser.add_argument("--split", action="append", help="a placement's settings; '' is colocated")
    parser.add_argument("--backend", default="local", choices=["local", "te"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--recompute", default="none", choices=["none", "pieces", "core_attn", "full"])
    parser.add_argument("--frames", type=least(1), help="default: the recipe's first stage's")
    parser.add_argument("--micro-batch", type=least(1), default=4, help="clips of an encoder replica")
    parser.add_argument("--micro-batches", type=least(1), default=8, help="of a step and GPU")
    parser.add_argument("--steps", type=least(1), default=5)
    parser.add_argument("--warmup", type=least(0), default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one case")
    parser.add_argument("--seconds", type=float, help="begin no case later than this")
    parser.add_argument("--out", type=Path, default=Path("runs/placement.jsonl"))
    return parser.parse_args()


def report(
    args: argparse.Namespace, world: int, setups: list[tuple[str, str]], done: dict[str, dict]
) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{world} x {name}, torch {torch.__version__}, {args.backend}, {args.precision}, recompute "
        f"{args.recompute}, micro-batch {args.micro_batch}, {args.micro_batches} of them a GPU and step"
    )
    names = ("ratio", 6), ("ceiling", 8), ("expected", 9), ("of it", 6), ("GiB", 5)
    print(f"{'clips/s/GPU':>11}" + "".join(f" {n:>{w}}" for n, w in names) + "  placement (idle)")
    for recipe in args.recipes:
        for tau in args.tau:
            print(f"{recipe}, tau {tau}")
            first = None
            for split in (split for other, split in setups if other == recipe):
                found, shown = done.get(case_name(recipe, tau, split), {}), short(split)
                if "rate" not in found:
                    print(f"{'-':>11}  {shown}: {found.get('error', 'ended without a word')}")
                    continue
                first = first or found["rate"]
                ratio, bound = found["rate"] / first, found["expected"]
                idle = ", ".join(f"{seat} {x['idle']:.0%}" for seat, x in found["seats"].items())
                gib = max(x["gib"] for x in found["seats"].values())
                numbers = f"{found['rate']:>11.2f} {ratio:>6.2f} {found['ceiling']:>8.2f} {bound:>9.2f}"
                waits = f" ({idle})" if len(found["seats"]) > 1 else ""
                print(f"{numbers} {ratio / bound:>6.0%} {gib:>5.0f}  {shown}{waits}")


def short(split: str) -> str:
    """A placement's settings without what all of them begin with."""
    words = (
        split.replace("--parallel.placement ", "").replace("--parallel.", "").replace("--train.", "").split()
    )
    return " ".join(words) if "--parallel.placement" in split else " ".join(["colocated", *words])


if __name__ == "__main__":
    sys.exit(main())
