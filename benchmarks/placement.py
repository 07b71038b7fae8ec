"""Colocated roles against groups of their own: clips per second per GPU, and who waits.

    torchrun --nproc-per-node 4 --max-restarts 20 benchmarks/placement.py vit_l vit_g --tau 1 4 --out FILE
    torchrun --nproc-per-node 2 benchmarks/placement.py tiny --split "--parallel.placement two-groups"

Every combination of recipe, tau and placement is a case: the real training step on clips and latents that lie
on the device. A placement is given as settings of the command line; without --split a few that fit the number
of ranks. Results go to FILE, a line a case. A case that fails (out of memory, most often) ends all processes;
torchrun's --max-restarts, or the same command again, goes on with the next one.

Columns. ratio: to the first case of the same recipe and tau, colocated data parallelism. ceiling: the ratio
if all ranks were equally fast and waited for lack of work alone; bubble: and the chain had to fill and drain;
of it: ratio / bubble. idle: share of a step that a seat's ranks spend in exchanges with other seats, mostly
waiting: sends and receives of the schedule, the reference's weights, the first reduction after the schedule.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Bench

from nextvid_mcore import cli, pretrain, recipes
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.parallel.balance import balance
from nextvid_mcore.parallel.groups import init_distributed
from nextvid_mcore.parallel.placement import resolve_placement

TWO, THREE = "--parallel.placement two-groups", "--parallel.placement three-groups"
PATIENCE = 180.0  # seconds for one collective
ANY_BATCH = math.lcm(*range(1, 65))  # any number of replicas can share it


class Stopwatch:
    """Time inside some methods, as the device sees it: between events on a GPU's stream."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.depth = cuda, 0
        self.spans: list[tuple[Any, Any]] = []

    def watch(self, owner: Any, name: str) -> None:
        """Time every call of `owner.name`; calls inside others count once."""
        inner: Callable = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return inner(*args, **kwargs)
            self.depth, begin = 1, self._now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.depth = 0
                self.spans.append((begin, self._now()))

        setattr(owner, name, timed)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """In all, after the device has finished."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(a.elapsed_time(b) for a, b in self.spans) / 1e3
        return sum(b - a for a, b in self.spans)


def watch_exchanges(bench: Bench) -> Stopwatch:
    """A stopwatch on everything in which this rank may wait for another seat."""
    watch, step = Stopwatch(bench.cuda), bench.step
    if bench.placement.separate:
        communicator = step.engine.communicator
        for name in dir(communicator):
            if name.startswith(("send_", "recv_")):
                watch.watch(communicator, name)
        watch.watch(step, "_mean_losses")
        if step.optimizers.send_reference is not None:
            watch.watch(step.optimizers, "send_reference")
    return watch


def splits(world: int) -> list[str]:
    """Placements to try: few ranks for the generator, half with the reference, the encoder pipelined."""
    found = ["", "--parallel.encoder.tensor 2"] if world % 2 == 0 else [""]
    if world >= 2:
        half = max(world // 2, 1)
        found.append(f"{TWO} --parallel.generator.data {half} --parallel.reference generator")
    if world >= 4:
        quarter = world // 4
        found.append(f"{TWO} --parallel.generator.data {quarter}")
        found.append(f"{TWO} --parallel.encoder.pipeline 2 --parallel.generator.data {half}")
        rest = f"--parallel.predictor.data {quarter} --parallel.decoder.data {quarter}"
        found.append(f"{THREE} {rest} --parallel.reference generator")
    return found


def configure(args: argparse.Namespace, recipe: str, tau: int, split: str, world: int) -> RunConfig:
    line = [recipe, "--dry-run", "--train.micro-batch", str(args.micro_batch), *split.split()]
    if args.sequence:
        line.append("--parallel.sequence")
    config, _ = cli.parse(line)
    stage = dataclasses.replace(
        config.stages[0],
        frames=args.frames or config.stages[0].frames,
        tau_samples=tau,
        batch=ANY_BATCH * args.micro_batch,
    )
    config = dataclasses.replace(
        config,
        stages=(stage,),
        model=dataclasses.replace(config.model, backend=args.backend),
        target=dataclasses.replace(config.target, kind="pixels"),
        train=dataclasses.replace(config.train, precision=args.precision),
        parallel=dataclasses.replace(config.parallel, recompute=args.recompute),
    )
    # The same number of clips per GPU and step in every placement, or the next above that can be shared.
    wave = args.micro_batch * resolve_placement(config, world).encoder.layout.data
    batch = max(round(args.micro_batch * args.micro_batches * world / wave), 1) * wave
    return dataclasses.replace(config, stages=(dataclasses.replace(stage, batch=batch),))


def run_case(config: RunConfig, steps: int, warmup: int) -> dict[str, Any]:
    """Measure one placement; the same on every rank."""
    bench = Bench(config)
    watch = watch_exchanges(bench)
    measured = bench.measure(steps, warmup, ready=watch.spans.clear)
    mine = {
        "seat": bench.step.seats.mine[-1].name,
        "gib": measured.gib,
        "idle": watch.seconds() / steps / measured.seconds,
    }
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
    ideal = balance(config, bench.placement, config.stages[0], target=False)
    return {
        "rate": bench.point.batch / measured.seconds / len(ranks),
        "milliseconds": 1e3 * measured.seconds,
        "loss": measured.loss,
        "micro_batches": len(bench.clips),
        "seats": seats,
        "ceiling": ideal.ceiling,
        "with_bubble": ideal.speed,
    }


class Results:
    """A line a case, in a file that a restarted process reads: `begun`, then a result or an error."""

    def __init__(self, path: Path) -> None:
        self.path = path

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


@functools.cache
def meeting_point() -> dist.Store:
    """The launcher's store, or one that rank 0 keeps."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not agent and os.environ["RANK"] == "0",
    )


def join(number: int) -> None:
    """A world of its own for every case, so that nothing of an earlier one is left."""
    cuda, key = torch.cuda.is_available(), f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number}"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore(key, meeting_point()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    init_distributed(PATIENCE)


def leave() -> None:
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    BridgeCommunicator._broadcast_pg_cache.clear()
    BridgeCommunicator._bridge_pg_cache.clear()
    dist.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    args = parse()
    world, rank = int(os.environ.get("WORLD_SIZE", "0")), os.environ.get("RANK")
    if not world:
        print("start it with torchrun --nproc-per-node N", file=sys.stderr)
        return 2
    pretrain.quiet()
    results, cases = Results(args.out), {}
    for recipe in args.recipes:
        for tau in args.tau:
            for split in args.split or splits(world):
                cases[f"{recipe} tau {tau} {split}".strip()] = (recipe, tau, split)
    done = results.read()  # before rank 0 writes
    for number, (case, (recipe, tau, split)) in enumerate(cases.items()):
        if "rate" in done.get(case, {}) or "error" in done.get(case, {}):
            continue
        if case in done:  # begun before a restart, and not finished
            if rank == "0":
                results.add(case, error="ended without a word")
            continue
        join(number)
        if rank == "0":
            results.add(case, begun=True)
            print(f"{case} ...", file=sys.stderr, flush=True)
        try:
            config = configure(args, recipe, tau, split, world)
        except ConfigError as error:  # on every rank
            if rank == "0":
                results.add(case, error=str(error))
            leave()
            continue
        try:
            found = run_case(config, args.steps, args.warmup)
        except Exception as error:
            results.add(case, error=f"rank {rank}: {str(error).splitlines()[0][:120]}")
            os._exit(1)  # the launcher ends the others
        if rank == "0":
            results.add(case, **found)
        leave()
    if rank == "0":
        report(args, world, cases, results.read())
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", choices=recipes.names(), metavar="RECIPE")
    parser.add_argument("--tau", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--split", action="append", help="a placement's settings; '' is colocated")
    parser.add_argument("--backend", default="local", choices=["local", "te"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--recompute", default="none", choices=["none", "core_attn", "full"])
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism inside tensor groups")
    parser.add_argument("--frames", type=int, help="default: the recipe's first stage's")
    parser.add_argument("--micro-batch", type=int, default=4, help="clips of an encoder replica")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step and GPU")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("placement.jsonl"))
    return parser.parse_args()


def report(args: argparse.Namespace, world: int, cases: dict[str, tuple], done: dict[str, dict]) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{world} x {name}, torch {torch.__version__}, {args.backend}, {args.precision}, recompute "
        f"{args.recompute}, micro-batch {args.micro_batch}"
    )
    names = ("ratio", 6), ("ceiling", 8), ("bubble", 7), ("of it", 6), ("GiB", 5)
    print(f"{'clips/s/GPU':>11}" + "".join(f" {n:>{w}}" for n, w in names) + "  placement (idle)")
    heading, first = None, None
    for case, (recipe, tau, split) in cases.items():
        if heading != (recipe, tau):
            heading, first = (recipe, tau), None
            print(f"{recipe}, tau {tau}")
        found, shown = done.get(case, {}), short(split)
        if "rate" not in found:
            print(f"{'-':>11}  {shown}: {found.get('error', 'ended without a word')}")
            continue
        first = first or found["rate"]
        ratio, bound = found["rate"] / first, found["with_bubble"]
        idle = ", ".join(f"{seat} {x['idle']:.0%}" for seat, x in found["seats"].items())
        gib = max(x["gib"] for x in found["seats"].values())
        numbers = f"{found['rate']:>11.2f} {ratio:>6.2f} {found['ceiling']:>8.2f} {bound:>7.2f}"
        waits = f" ({idle})" if len(found["seats"]) > 1 else ""
        print(f"{numbers} {ratio / bound:>6.0%} {gib:>5.0f}  {shown}{waits}")


def short(split: str) -> str:
    """A placement's settings without what all of them begin with."""
    words = split.replace("--parallel.placement ", "").replace("--parallel.", "").split()
    return " ".join(words) if "--parallel.placement" in split else " ".join(["colocated", *words])


if __name__ == "__main__":
    sys.exit(main())
