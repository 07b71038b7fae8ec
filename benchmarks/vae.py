"""VA-VAE online: what its encoder takes alone, and what the training step keeps of its rate with it.

    python benchmarks/vae.py --encoders 32 32:joined 32:joined:tuned --accumulate 2 vit_g \
        --model.backend te --train.micro-batch 16 --train.cuda-graphs on

Random weights of the true shape, frames that lie on the device, the clips' predicted frames alone, as in
the step. First the encoder's second convolutions, by torch and with their sums by cuDNN's plans; its norms,
cut in several ways; the encoder by itself, eager and in several forms (`Form`), with its kernels' time by
kind; then whole steps with latents that lie on the device, with the first form on the step's own stream (in
line) and beside it on its own (training/ahead.py), and beside it with those that were fastest alone.
Everything after RECIPE is a setting of the run, as of nextvid_mcore.pretrain.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from arguments import least
from common import PEAK_BF16, Bench, ResidentTarget, check, online_vae_target, quick_start
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nextvid_mcore import cli, flops
from nextvid_mcore.config import ConfigError, RunConfig, TargetConfig
from nextvid_mcore.parallel.groups import init_distributed
from nextvid_mcore.targets import target_channels
from nextvid_mcore.targets.cudnn_sum import Refused, convolution_sum
from nextvid_mcore.targets.va_vae import VA_VAE, VaVae

try:
    from nextvid_mcore.targets import triton_vae
except ImportError:  # Triton is not installed everywhere
    triton_vae = None

KINDS = {
    "norms and sums": ("_normalise", "_statistics", "_write"),
    "convolutions": ("conv", "fprop", "cudnn", "xmma"),
}

PARTS = ["sums", "norms", "alone", "step"]
TUNINGS = [
    {},
    {"ahead": True},
    {"slice": 16384},
    {"slice": 16384, "ahead": True},
    {"slice": 16384, "ahead": True, "hints": True},
    {"slice": 16384, "ahead": True, "hints": True, "stages": 4},
    {"slice": 16384, "ahead": True, "hints": True, "tile": 2048},
    {"hints": True},
]
best = triton_vae.PLAIN if triton_vae else None  # of TUNINGS, once part `norms` has run


@dataclass(frozen=True)
class Form:
    """Of the encoder, CHUNK[:joined][:tuned]: frames that go through it at once; convolutions add residuals;
    norms are cut as was fastest in part `norms`.
    """

    chunk: int
    joined: bool = False
    tuned: bool = False

    @staticmethod
    def read(text: str) -> Form:
        chunk, *flags = text.split(":")
        if not chunk.isdigit() or int(chunk) == 0 or not set(flags) <= {"joined", "tuned"}:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not CHUNK[:joined][:tuned], such as 32:joined; RECIPE comes after "
                "another option"
            )
        return Form(int(chunk), **dict.fromkeys(flags, True))

    def __str__(self) -> str:
        flags = [name for name in ("joined", "tuned") if getattr(self, name)]
        return " ".join([str(self.chunk), *flags])

    def of(self, target: VaVae) -> VaVae:
        """The same networks in this form; norms anywhere are cut as it says."""
        if triton_vae:
            triton_vae.PLAIN = best if self.tuned else triton_vae.Tuning()
        return VaVae(
            target.model, target.autoencoder, target.mean.flatten(), target.std.flatten(), chunk=self.chunk,
            fused=target.fused, joined=self.joined,
        )  # fmt: skip


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


def sums(config: RunConfig, chunk: int) -> None:
    """The convolutions that are followed by a sum: ms by torch without it, and of cuDNN's plans with it."""
    size, width = config.model.image_size, VA_VAE.width
    print(f"\n{'frames, channels, size':<26} {'torch':>7}   cuDNN with the sum, by plan, ms")
    for level, multiplier in enumerate(VA_VAE.multipliers):
        n, c = size >> level, width * multiplier
        x, rest = (
            torch.randn(chunk, n, n, c, device="cuda").bfloat16().permute(0, 3, 1, 2) for _ in range(2)
        )
        weight = torch.randn(c, c, 3, 3, device="cuda").bfloat16().to(memory_format=torch.channels_last)
        bias = torch.randn(c, device="cuda")
        with torch.backends.cudnn.flags(benchmark=True):
            plain = steady(lambda x=x, w=weight: F.conv2d(x, w, padding=1), 5)
        out = torch.empty_like(rest)
        name = f"{chunk}, {c}, {n}"
        try:
            convolution_sum()(x, weight, rest, bias, out)
        except Refused as error:
            print(f"{name:<26} {1e3 * plain:>7.3f}   {error}", flush=True)
            continue
        error = float((out - (F.conv2d(x, weight, bias.to(x.dtype), padding=1) + rest)).abs().max())
        times = "  ".join(f"{each:.3f}" for each in convolution_sum().times[-1])
        print(
            f"{name:<26} {1e3 * plain:>7.3f}   {times}   (off by {error:.2f} of {out.std():.0f})", flush=True
        )


def norms(config: RunConfig, chunk: int) -> None:
    """Norms of one and two convolutions' outputs, us by tuning; a copy is what memory allows."""
    global best
    size, width, times = config.model.image_size, VA_VAE.width, {}
    places = [(0, 1), (1, 1), (1, 2), (2, 1)]  # level, parts
    shapes = [(chunk, size >> n, size >> n, width * VA_VAE.multipliers[n]) for n, _ in places]
    heads = [f"{c} x {n}: {parts}" for (_, n, _, c), (_, parts) in zip(shapes, places, strict=True)]
    print("\n" + "".join(f"{head:>14}" for head in heads) + "   us")
    for tuning in [None, *TUNINGS]:
        row, again = [], ""
        for shape, (_, parts) in zip(shapes, places, strict=True):
            x = [torch.randn(shape, device="cuda").bfloat16() for _ in range(parts)]
            like = torch.empty_like(x[0])
            weight, bias = (torch.randn(shape[-1], device="cuda").bfloat16() for _ in range(2))
            total = triton_vae.Sum(bias.float(), tuple(x))

            def work(total=total, weight=weight, bias=bias, tuning=tuning, x=x, like=like) -> Tensor:
                if tuning is None:
                    return like.copy_(x[0])
                arrived = torch.zeros(len(like), dtype=torch.int32, device="cuda")
                how = triton_vae.Tuning(**tuning)
                return triton_vae.normalise(total, weight, bias, arrived, keep=len(x) > 1, tuning=how)[0]

            first = work()
            if not all(torch.equal(work(), first) for _ in range(20)):
                again = "   ANOTHER RESULT LATER"
            row.append(1e6 * steady(work))
            del x, like, total, first
        times[str(tuning)] = row[0]
        name = "copy" if tuning is None else " ".join(f"{k}={v:d}" for k, v in tuning.items()) or "as it is"
        print("".join(f"{each:>14.1f}" for each in row) + f"   {name}{again}", flush=True)
    best = triton_vae.Tuning(**min(TUNINGS, key=lambda tuning: times[str(tuning)]))


def steady(work: Callable[[], object], times: int = 20) -> float:
    """Seconds of a call among many in a row."""
    work()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times


def alone(config: RunConfig, forms: list[Form], times: int) -> list[Form]:
    """The encoder by itself, at the batch of a micro-batch. Returns the forms, the fastest first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, batch, size = config.stages[0], config.micro_batch(config.stages[0]), config.model.image_size
    loaded = online_vae_target(config, device, torch.bfloat16)
    video = torch.rand(batch, 3, stage.frames, size, size, device=device) * 2 - 1
    work = batch * flops.target_flops(config, stage)
    print(f"\nVA-VAE's encoder: {batch} clips of {stage.frames} frames, {work / batch / 1e12:.2f} TFLOP each")
    print(f"{'':<24} {'ms/clip':>8} {'TFLOP/s':>8} {'of peak':>7} {'GiB':>6} {'error':>8}")
    first, found = None, {}
    eager = VaVae(config.model, loaded.autoencoder, loaded.mean.flatten(), loaded.std.flatten())
    for form in [None, *(forms if device.type == "cuda" else [])]:
        name, target = ("eager", eager) if form is None else (f"fused {form}", form.of(loaded))
        start = time.perf_counter()
        try:
            got = target.latents(video, first=1)
        except Exception:  # the others are still worth having
            traceback.print_exc(limit=-6)
            continue
        synchronize()
        ready = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        seconds = median(lambda target=target: target.latents(video, first=1), times)
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
        first = got if first is None else first
        error = float((got - first).abs().max() / first.abs().max())
        again = "" if torch.equal(got, target.latents(video, first=1)) else "ANOTHER RESULT LATER, "
        print(
            f"{name:<24} {1e3 * seconds / batch:>8.2f} {work / seconds / 1e12:>8.0f} "
            f"{work / seconds / PEAK_BF16:>7.0%} {gib:>6.1f} {error:>8.1e}   "
            f"({again}first call {ready:.0f} s)",
            flush=True,
        )
        if form is not None:
            found[form] = seconds
        if device.type == "cuda":
            kernels(lambda target=target: target.latents(video, first=1))
        del target, got
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return sorted(found, key=found.__getitem__)


def in_the_step(config: RunConfig, first: Form, others: list[Form], steps: int, warmup: int) -> None:
    """Whole steps, one set of networks for all rows: `first` in line and beside, then the others beside."""
    with quick_start(online_vae_target):
        bench = Bench(config)
    engine, clips = bench.step.engine, config.micro_batch(config.stages[0])
    target, stream = engine.target, engine.ahead.stream
    model, frames = config.model, config.stages[0].frames
    resident = ResidentTarget(model, target.channels)
    rates = []
    tau, size = config.stages[0].tau_samples, config.stages[0].batch
    print(
        f"\n{config.recipe}, {frames} frames, tau {tau}, {size // clips} x {clips}, {model.backend}, "
        f"{'recorded' if engine.graphs else 'eager'}"
    )
    rows = [("in line", first), *(("beside", form) for form in (first, *others))]
    for place, form in [("resident", None), *rows, ("resident again", None)]:
        engine.target = resident if form is None else form.of(target)
        engine.ahead.stream = stream if place == "beside" else None
        if bench.cuda:
            torch.cuda.empty_cache()
        name = place if form is None else f"{place}: {form}"
        try:
            found = bench.measure(steps, warmup)
        except torch.OutOfMemoryError as error:  # the others are still worth having
            print(f"{name:<36} {str(error)[:80]}", flush=True)
            continue
        rates.append(size / found.seconds)
        print(
            f"{name:<36} {rates[-1]:>7.2f} clips/s {1e3 * found.seconds:>8.1f} ms {found.gib:>6.1f} GiB  "
            f"kept {rates[-1] / rates[0]:.1%}  loss {found.loss:.4f}",
            flush=True,
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--encoders", type=Form.read, nargs="+", default=[Form(32)], metavar="FORM")
    parser.add_argument("--best", type=least(0), default=2, help="of the other forms, so many in the step")
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
    first, *others = args.encoders
    for part in [each for each in PARTS if each in args.parts]:
        try:
            if part == "sums" and torch.cuda.is_available():
                sums(config, first.chunk)
            elif part == "norms" and torch.cuda.is_available():
                norms(config, first.chunk)
            elif part == "alone":
                others = [form for form in alone(config, args.encoders, args.steps) if form != first]
            elif part == "step":
                in_the_step(config, first, others[: args.best], args.steps, args.warmup)
        except Exception:  # the other part is still worth having
            traceback.print_exc()
            failed = 1
    dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
