"""Clips per second of the whole training step, on clips and latents that already lie on the device.

    python benchmarks/train_step.py vit_g --micro-batch 16 --backend local te

The step is the real one (training/step.py): both masks, reference forward, predictor, decoder, losses,
backward, clipping, AdamW, EMA. One row per backend and recomputation, compared as a ratio to the first.
With torchrun the batch is split over the ranks and the row says clips/s per GPU.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
import torch.distributed as dist
from common import PEAK_BF16, Bench

from nextvid_mcore import flops, recipes
from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig
from nextvid_mcore.parallel.groups import init_distributed


def configure(args: argparse.Namespace, backend: str, recompute: str, world: int) -> RunConfig:
    config = recipes.get(args.recipe)
    stage = dataclasses.replace(
        config.stages[0],
        frames=args.frames,
        tau_samples=args.tau,
        batch=args.micro_batch * world // args.tensor,
    )
    return dataclasses.replace(
        config,
        stages=(stage,),
        model=dataclasses.replace(config.model, backend=backend),
        target=dataclasses.replace(config.target, kind="pixels"),
        parallel=dataclasses.replace(
            config.parallel,
            encoder=RoleParallel(tensor=args.tensor),
            sequence=args.sequence,
            recompute=recompute,
        ),
        train=dataclasses.replace(config.train, micro_batch=args.micro_batch, precision=args.precision),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=recipes.names())
    parser.add_argument("--backend", nargs="+", default=["local"], choices=["local", "te"])
    parser.add_argument("--recompute", nargs="+", default=["none"], choices=["none", "core_attn", "full"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--tau", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    init_distributed()
    world, rows = dist.get_world_size(), []
    for backend in args.backend:
        for recompute in args.recompute:
            config = configure(args, backend, recompute, world)
            try:
                found = Bench(config).measure(args.steps, args.warmup)
            except (ConfigError, torch.OutOfMemoryError) as error:
                rows.append((backend, recompute, str(error).splitlines()[0][:80], None))
                continue
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            rows.append((backend, recompute, None, (config, found)))
    if dist.get_rank() == 0:
        report(args, rows, world)
    dist.destroy_process_group()


def report(args: argparse.Namespace, rows: list[tuple], world: int) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{args.recipe}, {args.frames} frames, tau {args.tau}, micro-batch {args.micro_batch}, "
        f"{args.precision}"
    )
    print(f"{world} x {name}, torch {torch.__version__}, tensor {args.tensor}, sequence {args.sequence}")
    print(
        f"{'backend':<8} {'recompute':<10} {'clips/s/GPU':>11} {'ms':>8} {'MFU':>6} {'GiB':>6} {'ratio':>6} "
        f"{'loss':>9}"
    )
    first = None
    for backend, recompute, error, found in rows:
        if found is None:
            print(f"{backend:<8} {recompute:<10} {error}")
            continue
        config, measured = found
        rate = args.micro_batch / measured.seconds / args.tensor
        first = first or rate
        work = flops.clip_flops(config, config.stages[0], executed=True).total
        mfu = f"{rate * work / PEAK_BF16:6.1%}" if torch.cuda.is_available() else "     -"
        print(
            f"{backend:<8} {recompute:<10} {rate:>11.2f} {1e3 * measured.seconds:>8.1f} {mfu} "
            f"{measured.gib:>6.1f} {rate / first:>6.2f} {measured.loss:>9.4f}"
        )


if __name__ == "__main__":
    main()
