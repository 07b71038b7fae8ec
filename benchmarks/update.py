# ruff: noqa: E402 (how Triton runs is settled first)
"""Milliseconds of a step's update: megatron-core's optimizer and EMA against one pass (training/one_pass.py).

    python benchmarks/update.py vit_g vit_l                       # one GPU; a minute and a half
    python benchmarks/update.py vit_g --search                    # and with other tiles
    python benchmarks/update.py tiny vit_l --repeat 1000          # and played twice a thousand times

Networks and state are a run's, gradients are random and stay. `step` is `RoleOptimizers.step`, again and
again with nothing in between; `norm` and `update` are the two kernels alone, with the bytes that they must
move. --repeat: so many updates from one state, twice, which must come out the same to the bit; else it ends
with 1. That takes two copies of the state. Without a GPU the kernels are interpreted: `tiny --steps 1`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import common
from arguments import least
from common import Bench, quick_start
from torch import Tensor
from train_step import configure, parse
from world import join, leave

from nextvid_mcore import cli, recipes
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.models import triton_update
from nextvid_mcore.training.one_pass import OnePass
from nextvid_mcore.training.optimizer import RoleOptimizers

TILES = [(256, 2), (512, 4), (1024, 8), (1024, 4), (2048, 8), (256, 1), (512, 2)]
CHUNKS = (2048, 8192, 32768)
LR = 1e-4


def configuration(recipe: str) -> RunConfig:
    _, (case,) = parse([recipe, "--micro-batch", "1", "--backend", "te" if CUDA else "local"])
    config = configure(case, 1)
    common.check(config, 1)
    return config


def milliseconds(work: Callable[[], object], count: int) -> float:
    """Of one call, host and device, in a row of `count`."""
    for _ in range(2 if CUDA else 0):
        work()
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    if CUDA:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def shards(update: OnePass) -> list[triton_update.Shard]:
    return [shard for table in update.tables for shard in table.shards]


def moved(update: OnePass) -> int:
    """Bytes that an update must read and write."""
    return sum(
        x.nbytes * (1 if name in ("grad", "weight", "reference") else 2)
        for shard in shards(update)
        for name in ("grad", "moment", "square", "master", "weight", "ema", "reference")
        if (x := getattr(shard, name)) is not None
    )


def written(update: OnePass) -> list[Tensor]:
    """All that an update changes."""
    return [x for shard in shards(update) for x in shard.tensors()[1:] if x is not None]


def repeated(optimizers: RoleOptimizers, count: int) -> str:
    """Twice `count` updates from the same state: what differs."""
    update, norms = optimizers.one_pass, []
    state = [x.clone() for x in written(update)]

    def play() -> None:
        torch._foreach_copy_(written(update), state)
        for number in range(1, count + 1):
            norms.append(update.norm(None))
            update.update(norms[-1], number)

    play()
    first = [x.clone() for x in written(update)]
    play()
    other = sum(not torch.equal(a, b) for a, b in zip(first, written(update), strict=True))
    lengths = len(torch.stack(norms).unique())
    moved_on = sum(not torch.equal(a, b) for a, b in zip(state, first, strict=True))
    right = not other and lengths == 1 and 2 * moved_on > len(state)
    return (
        f"{'the same' if right else 'NOT THE SAME'}: 2 x {count} updates, {other} of {len(state)} tensors "
        f"differ, {lengths} norm{'s' * (lengths > 1)} in all of them, {moved_on} tensors have moved"
    )


def tiles(name: str, optimizers: RoleOptimizers, size: int, count: int) -> Iterator[str]:
    usual = triton_update.BLOCK, triton_update.WARPS, triton_update.CHUNK
    try:
        for chunk in CHUNKS:
            for block, warps in TILES:
                triton_update.BLOCK, triton_update.WARPS, triton_update.CHUNK = block, warps, chunk
                update = optimizers.in_one_pass()
                norm = update.norm(None)
                ms = milliseconds(lambda: update.update(norm, 3), count)  # noqa: B023
                other = milliseconds(lambda: update.norm(None), count)  # noqa: B023
                yield (
                    f"{name:<8} chunk {chunk:>6} block {block:>5} warps {warps}: update {ms:>7.3f} ms "
                    f"{size / ms / 1e6:>5.0f} GB/s, norm {other:>7.3f} ms"
                )
    finally:
        triton_update.BLOCK, triton_update.WARPS, triton_update.CHUNK = usual


def measure(recipe: str, args: argparse.Namespace) -> Iterator[str]:
    """Lines of a table."""
    with quick_start():
        bench = Bench(configuration(recipe))
    optimizers = bench.step.optimizers
    generator = torch.Generator(bench.step.device).manual_seed(0)
    for role in optimizers.roles.values():
        for buffer in role.buffers:
            buffer.grad_data.normal_(std=1e-4, generator=generator)
    for optimizer in optimizers.optimizers.values():
        optimizer.set_lr(LR)
    update = optimizers.in_one_pass()
    count = sum(shard.grad.numel() for shard in shards(update))
    found = {}
    for name, way in (("megatron", None), ("one pass", update), ("megatron", None), ("one pass", update)):
        optimizers.one_pass = way
        optimizers.set_updates(100)
        found.setdefault(name, []).append(milliseconds(optimizers.step, args.steps))
    before, now = (min(found[name]) for name in ("megatron", "one pass"))
    norm = update.norm(None)
    squares = milliseconds(lambda: update.norm(None), args.steps)
    alone = milliseconds(lambda: update.update(norm, 101), args.steps)
    yield (
        f"{recipe:<8} {count / 1e6:>7.1f} M: step {before:.2f} -> {now:.2f} ms, ratio {now / before:.3f}; "
        f"norm {squares:>6.3f} ms {4 * count / squares / 1e6:>5.0f} GB/s; "
        f"update {alone:>6.3f} ms {moved(update) / alone / 1e6:>5.0f} GB/s, {moved(update) / count:.1f} B "
        f"a parameter"
    )
    if args.repeat:
        yield f"{recipe:<8} {repeated(optimizers, args.repeat)}"
    if args.search:
        yield from tiles(recipe, optimizers, moved(update), args.steps)
    bench.step.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", choices=recipes.names(), metavar="recipe")
    parser.add_argument("--steps", type=least(1), default=20)
    parser.add_argument("--search", action="store_true", help="try other tiles")
    parser.add_argument("--repeat", type=least(0), default=0, help="updates that are compared to the bit")
    args = parser.parse_args()
    lines = []
    for number, recipe in enumerate(args.recipes):
        try:
            configuration(recipe)
        except ConfigError as error:
            cli.fail(error)
        join(number)
        try:
            for line in measure(recipe, args):
                lines.append(line)
                print(line, flush=True)
        except Exception:  # one recipe must not cost the others
            traceback.print_exc(limit=-6)
            lines.append(f"{recipe:<8} failed")
        finally:
            leave()
    print(f"\n{torch.cuda.get_device_name() if CUDA else 'CPU, interpreted'}, torch {torch.__version__}")
    print("\n".join(lines))
    return int(any("NOT THE SAME" in line or "failed" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
