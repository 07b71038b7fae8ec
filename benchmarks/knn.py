"""What the online kNN costs beside the steps, measured: steps with and without one among them.

    python benchmarks/knn.py vit_g --micro-batch 16 --accumulate 2
    python benchmarks/knn.py digits_32 --backend local --compile 0 --micro-batch 64

Both are the real ones (training/step.py, training/online_knn.py), on clips that already lie on the device;
the kNN's are moving digits of the recipe's frame size, whose pixels make no difference to the time. Rounds
of --steps steps without and with one kNN follow each other. The share is that of a run of the recipe: what
a kNN adds, over the time of `--every` of its steps at these clips a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from statistics import median

import torch
import torch.distributed as dist
from arguments import least
from common import Bench, check, quick_start
from train_step import KEYS, configure, parse

from nextvid_mcore import cli, recipes
from nextvid_mcore.config import MOVING_DIGITS, ConfigError, RunConfig
from nextvid_mcore.data.labelled import build_labelled
from nextvid_mcore.parallel.groups import init_distributed
from nextvid_mcore.training.online_knn import OnlineKnn


def with_clips(config: RunConfig, samples: int, workers: int) -> RunConfig:
    """The configuration with an online kNN on moving digits."""
    data = dataclasses.replace(
        config.data, manifest=MOVING_DIGITS, eval_manifest=MOVING_DIGITS, workers=workers
    )
    return dataclasses.replace(
        config, data=data, eval=dataclasses.replace(config.eval, knn_every=1, knn_samples=samples)
    )


def seconds(bench: Bench, steps: int, knn: OnlineKnn | None = None) -> float:
    """Of `steps` steps, and one kNN after them."""
    bench.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        bench.run()
    if knn is not None:
        knn.run()
    bench.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=recipes.names(), metavar="RECIPE")
    parser.add_argument("--backend", default="te", choices=["local", "te"])
    parser.add_argument("--compile", type=int, default=1)
    parser.add_argument("--graphs", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--micro-batch", type=least(1), default=16)
    parser.add_argument("--accumulate", type=least(1), default=1, help="micro-batches a step")
    parser.add_argument("--samples", type=least(6), default=1024, help="clips of a kNN")
    parser.add_argument(
        "--every", type=least(1), nargs="+", default=[100, 500, 1000], help="steps of the recipe"
    )
    parser.add_argument("--steps", type=least(1), default=5, help="of a round")
    parser.add_argument("--warmup", type=least(0), default=3)
    parser.add_argument("--rounds", type=least(1), default=3)
    parser.add_argument("--workers", type=least(0), default=4, help="that make the clips")
    args = parser.parse_args()
    init_distributed()
    recipe = recipes.get(args.recipe)
    _, [case] = parse([args.recipe])  # what is not said here is train_step.py's
    case |= {key: value for key, value in vars(args).items() if key in KEYS}
    case["frames"] = recipe.stages[0].frames
    try:
        config = with_clips(configure(case, dist.get_world_size()), args.samples, args.workers)
        check(config, dist.get_world_size())
        build_labelled(config)
    except ConfigError as error:
        cli.fail(error)
    with quick_start():
        bench = Bench(config)
    for _ in range(args.warmup):
        bench.take()
    knn = OnlineKnn(config, bench.step, bench.step.seats, lambda text: print(text, flush=True))
    knn.run()  # reads its clips
    plain, both = [], []
    for number in range(args.rounds):
        plain.append(seconds(bench, args.steps))
        both.append(seconds(bench, args.steps, knn))
        print(
            f"round {number + 1}: {args.steps} steps {plain[-1]:.3f} s, and a kNN {both[-1]:.3f} s",
            flush=True,
        )
    step, extra = median(plain) / args.steps, median(both) - median(plain)
    rate = bench.point.batch / step
    name = torch.cuda.get_device_name() if bench.cuda else "CPU"
    print(f"\n{name}, torch {torch.__version__}; {case}")
    print(
        f"{rate:.1f} clips/s in training; a kNN of {args.samples:,} clips of {case['frames']} frames adds "
        f"{extra:.2f} s, {args.samples / extra:.0f} clips/s"
    )
    first = recipe.stages[0]
    for every in args.every:
        share = extra / (every * recipe.batch(first) / rate)
        print(f"  every {every:,} steps of {recipe.batch(first):,} clips: {share:.3%} of the time")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
