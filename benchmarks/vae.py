"""VA-VAE online: what its encoder takes alone, and what the training step keeps of its rate with it.

    python benchmarks/vae.py --chunks 32 56 --accumulate 2 vit_g --model.backend te --train.micro-batch 16

Random weights of the true shape, frames that lie on the device, the clips' predicted frames alone, as in
the step. First the encoder by itself, eager and fused, with its kernels' time by kind; then whole steps
with latents that lie on the device, with the encoder on the step's own stream, and beside it on its own
(training/ahead.py), and that recorded (targets/replayed.py), as a run does, by frames that go through it at
once. Everything after RECIPE is a setting of the run, as of nextvid_mcore.pretrain.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from arguments import least
from common import PEAK_BF16, Bench, ResidentTarget, check, online_vae_target, quick_start
from torch.profiler import ProfilerActivity, profile

from nextvid_mcore import cli, flops
from nextvid_mcore.config import ConfigError, RunConfig, TargetConfig
from nextvid_mcore.parallel.groups import init_distributed
from nextvid_mcore.targets import target_channels
from nextvid_mcore.targets.va_vae import VaVae

KINDS = {
    "norms and sums": ("_normalise", "_statistics", "_write"),
    "convolutions": ("conv", "fprop", "cudnn", "xmma"),
}


WAYS = ("in line", "beside", "recorded, beside")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(work: Callable[[], object], times: int) -> float:
    """Seconds of a call, the median, after one."""
    found = []
    for _ in range(times + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[times // 2]


def kernels(work: Callable[[], object]) -> None:
    """Print the GPU's time in one call by kind of kernel, and the ten that take most."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        synchronize()
    times: Counter[str] = Counter()
    for event in found.events():
        times[event.name] += event.device_time
    kinds: Counter[str] = Counter()
    for name, spent in times.items():
        kinds[next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")] += spent
    total = max(sum(kinds.values()), 1e-9)
    print("  ".join(f"{kind}: {spent / 1e3:.1f} ms, {spent / total:.0%}" for kind, spent in kinds.items()))
    for name, spent in times.most_common(10):
        print(f"    {spent / 1e3:8.2f} ms  {name[:100]}")


def another(loaded: VaVae, config: RunConfig, chunk: int, **how: bool) -> VaVae:
    """With the same weights."""
    mean, std = loaded.mean.flatten(), loaded.std.flatten()
    return VaVae(config.model, loaded.autoencoder, mean, std, chunk=chunk, **how)


def alone(config: RunConfig, chunks: list[int], times: int) -> None:
    """The encoder by itself, at the batch of a micro-batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, batch, size = config.stages[0], config.micro_batch(config.stages[0]), config.model.image_size
    loaded = online_vae_target(config, device, torch.bfloat16)
    video = torch.rand(batch, 3, stage.frames, size, size, device=device) * 2 - 1
    work = batch * flops.target_flops(config, stage)
    print(f"\nVA-VAE's encoder: {batch} clips of {stage.frames} frames, {work / batch / 1e12:.2f} TFLOP each")
    print(f"{'':<16} {'chunk':>5} {'ms/clip':>8} {'TFLOP/s':>8} {'of peak':>7} {'GiB':>6} {'error':>8}")
    first = None
    ways = {"eager": [chunks[0]], **({"fused": chunks, "fused, recorded": chunks} if loaded.fused else {})}
    for way, chunk in [(way, chunk) for way, chunks in ways.items() for chunk in chunks]:
        target = another(loaded, config, chunk, fused=way != "eager", recorded="recorded" in way)
        start = time.perf_counter()
        got = target.latents(video, first=1)
        synchronize()
        ready = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        seconds = median(lambda target=target: target.latents(video, first=1), times)
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
        first = got if first is None else first
        error = float((got - first).abs().max() / first.abs().max())
        print(
            f"{way:<16} {chunk:>5} {1e3 * seconds / batch:>8.2f} "
            f"{work / seconds / 1e12:>8.0f} {work / seconds / PEAK_BF16:>7.0%} {gib:>6.1f} {error:>8.1e}   "
            f"(first call {ready:.0f} s)",
            flush=True,
        )
        if device.type == "cuda":
            kernels(lambda target=target: target.latents(video, first=1))


def in_the_step(config: RunConfig, chunks: list[int], steps: int, warmup: int) -> None:
    """Whole steps, one set of networks for all rows."""
    with quick_start(online_vae_target):
        bench = Bench(config)
    engine, clips = bench.step.engine, config.micro_batch(config.stages[0])
    loaded, stream = engine.target, engine.ahead.stream
    model, frames = config.model, config.stages[0].frames
    resident = ResidentTarget(model, loaded.channels)
    rates = []
    tau, size = config.stages[0].tau_samples, config.stages[0].batch
    print(
        f"\n{config.recipe}, {frames} frames, tau {tau}, {size // clips} x {clips}, {model.backend}, "
        f"{'recorded' if engine.graphs else 'eager'}"
    )
    ways = [(f"{way}, {c}", way, c) for c in chunks for way in WAYS]
    for name, way, chunk in [("latents resident", "", 1), *ways, ("resident again", "", 1)]:
        engine.target = resident
        if way:
            engine.target = another(loaded, config, chunk, fused=loaded.fused, recorded="recorded" in way)
        engine.ahead.stream = stream if "beside" in way else None
        torch.cuda.empty_cache()
        found = bench.measure(steps, warmup)
        rates.append(size / found.seconds)
        print(
            f"{name:<24} {rates[-1]:>7.2f} clips/s {1e3 * found.seconds:>8.1f} ms {found.gib:>6.1f} GiB  "
            f"kept {rates[-1] / rates[0]:.1%}  loss {found.loss:.4f}",
            flush=True,
        )


def chunk(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of frames; RECIPE comes after another option: --chunks 32 --tau 1 vit_g"
        )
    return int(text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", default=["alone", "step"], choices=["alone", "step"])
    parser.add_argument("--chunks", type=chunk, nargs="+", default=[32])
    parser.add_argument("--frames", type=least(1), default=16)
    parser.add_argument("--tau", type=least(1), default=1)
    parser.add_argument("--accumulate", type=least(1), default=1, help="micro-batches a step")
    parser.add_argument("--steps", type=least(1), default=6)
    parser.add_argument("--warmup", type=least(0), default=2)
    parser.add_argument("recipe", help="followed by its settings")
    args, settings = parser.parse_known_args(argv)
    try:
        config, _ = cli.parse([args.recipe, *settings, "--dry-run", "--world-size", "1"])
        batch = config.micro_batch(config.stages[0]) * args.accumulate
        stage = dataclasses.replace(config.stages[0], frames=args.frames, tau_samples=args.tau, batch=batch)
        config = dataclasses.replace(
            config, stages=(stage,), target=TargetConfig("va_vae", chunk=config.target.chunk)
        )
        target_channels(config)  # a latent a patch
        if "step" in args.parts:
            check(config, 1)
        init_distributed()
    except ConfigError as error:
        cli.fail(error)
    failed = 0
    for part in args.parts:
        try:
            if part == "alone":
                alone(config, args.chunks, args.steps)
            else:
                in_the_step(config, args.chunks, args.steps, args.warmup)
        except Exception:  # the other part is still worth having
            traceback.print_exc()
            failed = 1
    dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
