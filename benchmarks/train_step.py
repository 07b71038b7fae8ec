"""Clips per second of the whole training step, on clips and latents that already lie on the device.

    python benchmarks/train_step.py vit_g --micro-batch 16 --backend local te

The step is the real one (training/step.py): both masks, reference forward, predictor, decoder, losses,
backward, clipping, AdamW, EMA. One row per backend and recomputation, compared as a ratio to the first.
With torchrun the batch is split over the ranks and the row says clips/s per GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
import torch.distributed as dist

from nextvid_mcore import flops, recipes
from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.parallel.seats import build_seats
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.training.step import TrainStep

PEAK_BF16 = 989e12  # dense FLOP/s of one H100 or H200


class ResidentTarget:
    """Latents that lie on the device: the step without its target's cost."""

    def __init__(self, latents: torch.Tensor) -> None:
        self._latents, self.channels = latents, latents.shape[-1]

    def latents(self, video: torch.Tensor, static: object = None, indices: object = None) -> torch.Tensor:
        return self._latents[: video.shape[0]]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("resident latents are random: there is no video behind them")


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


def measure(config: RunConfig, steps: int, warmup: int) -> dict[str, float]:
    """Seconds a step (median), memory and the last loss."""
    seats = build_seats(resolve_placement(config, dist.get_world_size()))
    groups = seats.home
    seed_trackers(0, groups)
    step = TrainStep(config, seats)
    stage, device = config.stages[0], step.device
    size, b = config.model.image_size, config.train.micro_batch
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    clip = ClipBatch(
        video=torch.randint(
            0, 256, (b, 3, stage.frames, size, size), dtype=torch.uint8, device=device, generator=generator
        ),
        index=torch.arange(b) + b * groups.data_rank,
        label=torch.full((b,), -1),
        static=torch.zeros(b, dtype=torch.bool),
        items=[""] * b,
    )
    t, n = config.model.token_frames(stage.frames), config.model.tokens_per_frame
    if "decoder" in step.model.holds:
        latents = torch.randn(b, t, n, step.target.channels, device=device, generator=generator)
        step.engine.target = ResidentTarget(latents)
    point = Schedule(config).at(0)
    times, result = [], None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(warmup + steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = step.run(point, [clip])
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else float("nan")
    return {"seconds": sorted(times)[len(times) // 2], "gib": memory, "loss": result.loss}


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
                found = measure(config, args.steps, args.warmup)
            except (ConfigError, torch.OutOfMemoryError) as error:
                rows.append((backend, recompute, str(error).splitlines()[0][:80], None))
                continue
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            rows.append((backend, recompute, None, found | {"config": config}))
    if dist.get_rank() == 0:
        report(args, rows, world)
    dist.destroy_process_group()


def report(args: argparse.Namespace, rows: list[tuple], world: int) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{args.recipe}, {args.frames} frames, tau {args.tau}, micro-batch {args.micro_batch}, {args.precision}"
    )
    print(f"{world} x {name}, torch {torch.__version__}, tensor {args.tensor}, sequence {args.sequence}")
    print(
        f"{'backend':<8} {'recompute':<10} {'clips/s/GPU':>11} {'ms':>8} {'MFU':>6} {'GiB':>6} {'ratio':>6} {'loss':>9}"
    )
    first = None
    for backend, recompute, error, found in rows:
        if found is None:
            print(f"{backend:<8} {recompute:<10} {error}")
            continue
        rate = args.micro_batch / found["seconds"] / args.tensor
        first = first or rate
        work = flops.clip_flops(found["config"], found["config"].stages[0], executed=True).total
        mfu = f"{rate * work / PEAK_BF16:6.1%}" if torch.cuda.is_available() else "     -"
        print(
            f"{backend:<8} {recompute:<10} {rate:>11.2f} {1e3 * found['seconds']:>8.1f} {mfu} "
            f"{found['gib']:>6.1f} {rate / first:>6.2f} {found['loss']:>9.4f}"
        )


if __name__ == "__main__":
    main()
