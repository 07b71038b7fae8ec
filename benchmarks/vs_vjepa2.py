"""Our training step beside V-JEPA 2's own, in one run on one GPU; prints the ratios of clips per second.

    git clone https://github.com/facebookresearch/vjepa2 ../vjepa2
    python benchmarks/vs_vjepa2.py --checkout ../vjepa2 --rows blocks,delayed,bf16,eager vit_g \
        --model.backend te --train.micro-batch 16

Both take whole steps on clips that lie on the device (benchmarks/vjepa2_step.py says how theirs is run), each
at a batch of its own: theirs is the first of --batch that fits, with the activation checkpointing of
--config, ours --accumulate micro-batches. --rows are measured in their order: of theirs `eager`, `compiled`
(its option `compile_model`) and `blocks` (every block compiled, which torch can do where it can't the whole);
of ours `bf16` and the recipes of FP8, in every network. Everything after RECIPE is a setting of ours, as of
nextvid_mcore.pretrain; our latents are random and resident, since V-JEPA 2 has no generation target.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import vjepa2_step
from arguments import least
from common import Bench, Measured, check, quick_start

from nextvid_mcore import cli
from nextvid_mcore.config import ConfigError, Fp8Config, RunConfig, TargetConfig, require
from nextvid_mcore.parallel.groups import init_distributed

OURS = ("bf16", "current", "delayed", "blockwise", "mxfp8")
CONFIG = "configs/train/{}16/pretrain-256px-16f.yaml"


def ours(argv: list[str], tau: int, accumulate: int, frames: int, size: int) -> RunConfig:
    """The run that the arguments after RECIPE describe, as one step of `frames` frames on one GPU."""
    config, _ = cli.parse([*argv, "--dry-run", "--world-size", "1"])
    require(
        config.model.image_size == size,
        f"V-JEPA 2's configuration has {size} pixels and ours {config.model.image_size}; compare like with "
        f"like: --model.image-size {size} or another --config",
    )
    batch = config.micro_batch(config.stages[0]) * accumulate
    stage = dataclasses.replace(config.stages[0], frames=frames, tau_samples=tau, batch=batch)
    target = TargetConfig("va_vae" if config.model.patch_size == 16 else "pixels")
    train = dataclasses.replace(config.train, steps=None)  # an ablation's: more than its first stage has
    return dataclasses.replace(config, stages=(stage,), target=target, train=train)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    way: str  # as in --rows
    batch: int
    found: Measured

    @property
    def rate(self) -> float:
        return self.batch / self.found.seconds


def measure_theirs(args: argparse.Namespace, checkout: Path, settings: dict, way: str) -> Row:
    """At the first batch that fits."""
    name = f"V-JEPA 2, {way}"
    for batch in args.batch:
        start = time.perf_counter()
        try:
            found = vjepa2_step.measure(checkout, settings, batch, args.steps, args.warmup, way, args.masks)
        except torch.OutOfMemoryError:
            print(f"{name}: {batch} clips do not fit", flush=True)
            continue
        finally:
            vjepa2_step.free()
        held = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        print(f"{name}: {time.perf_counter() - start:.0f} s in all; {held:.1f} GiB still held", flush=True)
        return Row(name, way, batch, found)
    raise ConfigError(f"V-JEPA 2's step fits with none of --batch {' '.join(map(str, args.batch))}")


def measure_ours(args: argparse.Namespace, config: RunConfig, way: str) -> Row:
    with quick_start():
        bench = Bench(config)
    found = bench.measure(args.steps, args.warmup)
    bench.step.close()
    return Row(f"ours, {config.model.backend}, {way}", way, config.stages[0].batch, found)


def ways(text: str) -> list[str]:
    """The rows that --rows names."""
    found, there = text.split(","), (*vjepa2_step.WAYS, *OURS)
    for way in found:
        if way not in there:
            raise argparse.ArgumentTypeError(f"{way!r} is none of {', '.join(there)}")
    return found


def table(rows: list[Row]) -> list[str]:
    """A line a row; under `/ eager` is the ratio of its clips a second to those of that row."""
    theirs = [row for row in rows if row.way in vjepa2_step.WAYS]
    heads = "".join(f"{'/ ' + row.way:>11}" for row in theirs)
    lines = [f"{'':<22} {'batch':>5} {'clips/s':>8} {'ms':>8} {'GiB':>6}{heads} {'loss':>9}"]
    for row in rows:
        ratios = "".join(f"{row.rate / other.rate:>11.2f}" for other in theirs)
        lines.append(
            f"{row.name:<22} {row.batch:>5} {row.rate:>8.2f} {1e3 * row.found.seconds:>8.1f} "
            f"{row.found.gib:>6.1f}{ratios} {row.found.loss:>9.4f}"
        )
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkout", type=Path, required=True, help="a clone of facebookresearch/vjepa2")
    parser.add_argument("--config", help="a file in it; default: pretraining at 256 pixels of RECIPE's size")
    parser.add_argument("--rows", type=ways, default=["eager", "bf16"], help="what to measure, with commas")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no row begins")
    parser.add_argument("--batch", type=least(1), nargs="+", default=[32, 24, 16], help="V-JEPA 2's, to try")
    parser.add_argument(
        "--masks", type=least(1), default=4, help="batches of V-JEPA 2's masks, taken in turn"
    )
    parser.add_argument("--tau", type=least(1), default=1, help="samples of tau, of our flow loss")
    parser.add_argument("--accumulate", type=least(1), default=2, help="our micro-batches a step")
    parser.add_argument("--steps", type=least(1), default=6)
    parser.add_argument("--warmup", type=least(0), default=3)
    parser.add_argument("recipe", help="ours, followed by its settings")
    args, settings_of_ours = parser.parse_known_args(argv)
    start = time.perf_counter()
    try:
        checkout = vjepa2_step.check_checkout(args.checkout)
        name = args.config or CONFIG.format(args.recipe.replace("_", ""))
        settings = vjepa2_step.read_settings(checkout, name)
        shape = vjepa2_step.frames_and_size(settings)
        config = ours([args.recipe, *settings_of_ours], args.tau, args.accumulate, *shape)
        configs = {
            way: config if way == "bf16" else config.altered(fp8=Fp8Config(all=way))
            for way in args.rows
            if way in OURS
        }
        for each in configs.values():
            check(each, 1)
        init_distributed()
        require(
            dist.get_world_size() == 1, f"this compares on one GPU; started {dist.get_world_size()} processes"
        )
    except ConfigError as error:
        cli.fail(error)
    rows = []
    for way in args.rows:
        if time.perf_counter() - start > args.limit:
            print(f"{way}: not begun within {args.limit:.0f} s", flush=True)
            continue
        try:
            if way in configs:
                rows.append(measure_ours(args, configs[way], way))
            else:
                rows.append(measure_theirs(args, checkout, settings, way))
            print("\n".join(table(rows)), flush=True)
        except Exception:  # the other measurements are still worth having
            traceback.print_exc()
        vjepa2_step.free()
    frames, size = shape
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{args.recipe}, tau {args.tau}, and {name}: {frames} frames of {size} pixels")
    print(f"1 x {device}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s in all")
    print("\n".join(table(rows)), flush=True)
    dist.destroy_process_group()
    return 0 if len(rows) == len(args.rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
