"""Clips per second of the whole training step, on clips and latents that already lie on the device.

    python benchmarks/train_step.py vit_g --micro-batch 16 --accumulate 2
    python benchmarks/train_step.py vit_g --case "backend=te fp8=current" --case "backend=te tau=4 frames=16"

The step is the real one (training/step.py): both masks, reference forward, predictor, decoder, losses,
backward, clipping, AdamW, EMA; steps follow each other without waiting, as in a run. One row a case, compared
as a ratio to the first. A case is a list of settings over those of the command line (`KEYS`). MFU counts the
model FLOPs of what was really visible, without recomputation, over 989 TFLOP/s. Memory is what the allocator
reserved. With torchrun the batch is split over the ranks and a row says clips/s per GPU; there a case with
gpus=1 trains on every GPU for itself, and the row is rank 0's:

    torchrun --nproc-per-node 2 benchmarks/train_step.py vit_g --accumulate 2 --graphs on --case gpus=1 \
        --case gpus=2 --case "tensor=2 sequence=1 micro_batch=32 generator=2"
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import common
import torch
import torch.distributed as dist
from common import PEAK_BF16, Bench, quick_start
from parts import PARTS, Activity, activity, shares
from world import first_says, join, leave

from nextvid_mcore import cli, flops, recipes, switches
from nextvid_mcore.config import ConfigError, Fp8Config, RoleParallel, RunConfig, require
from nextvid_mcore.targets.va_vae import VaVae

KEYS = {
    "recipe": str,
    "backend": str,
    "fp8": str,  # none, current, delayed, blockwise: of all roles, or role:recipe,role:recipe
    "fp8_fused": int,  # 0: delayed's GELU writes bf16, which is then quantised
    "fp8_layer": str,  # of nextvid_mcore/switches.py: trained,carry,attention; all, none
    "pieces": str,  # likewise: gated_norm,monitors,pixels; all, none
    "recompute": str,
    "compile": int,
    "one_pass": int,  # the update in one kernel
    "graphs": str,  # on, off or auto
    "precision": str,
    "micro_batch": int,
    "accumulate": int,  # micro-batches a step
    "frames": int,
    "tau": int,
    "gpus": int,  # 1: each GPU for itself; else the world's
    "tensor": int,
    "sequence": int,
    "overlap": str,  # --parallel.tensor-overlap: on, off or auto
    "generator": int,  # data replicas of predictor and decoder on the tensor ranks
    "vae": int,  # VA-VAE of random weights encodes the clips in every step: 1 as a run does, 2 not recorded
    "shares": int,  # 0: without the parts' shares, an eager step
}

WAITS = 8  # printed beside the kernels


WAYS = {
    "fp8_layer": ("trained", "carry", "attention"),
    "pieces": ("gated_norm", "monitors", "pixels"),
}


def fp8_config(text: str, fused: int) -> Fp8Config:
    recipes = dict(part.partition(":")[::2] for part in text.split(",")) if ":" in text else {"all": text}
    known = ("all", *Fp8Config().recipes())
    require(recipes.keys() <= set(known), f"fp8={text}: the roles are {', '.join(known)}")
    return Fp8Config(**recipes, fused=bool(fused))


def switched(case: dict[str, Any]) -> dict[str, bool]:
    """For `switches.changed`."""
    found = {"one_pass": bool(case["one_pass"])}
    for key, known in WAYS.items():
        if case[key] == "as_shipped":
            continue
        names = {"none": (), "all": known}.get(case[key])
        names = case[key].split(",") if names is None else names
        require(set(names) <= set(known), f"{key}={case[key]}: there are {', '.join(known)}, all and none")
        found |= {name: name in names for name in known}
    return found


def configure(case: dict[str, Any], world: int) -> RunConfig:
    config = recipes.get(case["recipe"])
    stage = dataclasses.replace(
        config.stages[0],
        frames=case["frames"],
        tau_samples=case["tau"],
        batch=case["micro_batch"] * case["accumulate"] * (world // case["tensor"]),
    )
    return dataclasses.replace(
        config,
        stages=(stage,),
        model=dataclasses.replace(config.model, backend=case["backend"], compile=bool(case["compile"])),
        target=dataclasses.replace(
            config.target,
            kind="va_vae" if config.model.patch_size == 16 else "pixels",
        ),
        fp8=fp8_config(case["fp8"], case["fp8_fused"]),
        parallel=dataclasses.replace(
            config.parallel,
            encoder=RoleParallel(tensor=case["tensor"]),
            generator=RoleParallel(data=case["generator"] * (world // case["tensor"]) or None),
            sequence=bool(case["sequence"]),
            tensor_overlap=case["overlap"],
            recompute=case["recompute"],
        ),
        train=dataclasses.replace(
            config.train,
            steps=None,  # an ablation's: more than its first stage has
            micro_batch=case["micro_batch"],
            precision=case["precision"],
            cuda_graphs=case["graphs"],
        ),
    )


def check(case: dict[str, Any], world: int) -> None:
    """Raise ConfigError where `case` can't be measured on this machine's `world` processes."""
    ranks, tensor, recipe = 1 if case["gpus"] == 1 else world, case["tensor"], case["recipe"]
    require(recipe in recipes.names(), f"recipe={recipe}: there are {', '.join(recipes.names())}")
    for key in ("micro_batch", "accumulate", "frames", "tau"):
        require(case[key] >= 1, f"{key}={case[key]}: give 1 or more")
    require(
        case["gpus"] in (0, 1, world),
        f"gpus={case['gpus']}: {world} process{'es were' if world > 1 else ' was'} started; give 1, for "
        f"every GPU by itself, or start {case['gpus']} with torchrun --nproc-per-node",
    )
    require(
        tensor >= 1 and ranks % tensor == 0,
        f"tensor={tensor} can't share {ranks} process{'es' if ranks > 1 else ''}; start a multiple of it "
        "with torchrun --nproc-per-node",
    )
    require(case["vae"] in (0, 1, 2), f"vae={case['vae']}: give 0 (latents resident), 1, or 2 (not recorded)")
    switched(case)
    with own_words():
        config = configure(case, ranks)
    require(
        not case["vae"] or config.target.kind == "va_vae",
        f"vae={case['vae']}: recipe {recipe} has patches of {config.model.patch_size} pixels, VA-VAE's "
        "latents 16; leave vae out or take vit_l, vit_h or vit_g",
    )
    with own_words():
        common.check(config, ranks)


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """What is refused names the trainer's flags; here they are keys."""
    try:
        yield
    except ConfigError as error:
        said = str(error).replace("--model.backend ", "backend=").replace("--train.cuda-graphs ", "graphs=")
        raise ConfigError(said) from None


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=recipes.names(), metavar="RECIPE")
    parser.add_argument("--case", action="append", default=[], help='such as "backend=te tau=4"')
    parser.add_argument("--backend", default="te", choices=["local", "te"])
    parser.add_argument("--fp8", default="none")
    parser.add_argument("--fp8-fused", type=int, default=1)
    parser.add_argument("--fp8-layer", default="as_shipped")
    parser.add_argument("--pieces", default="as_shipped")
    parser.add_argument("--recompute", default="none", choices=["none", "pieces", "core_attn", "full"])
    parser.add_argument("--compile", type=int, default=1)
    parser.add_argument("--one-pass", type=int, default=1)
    parser.add_argument("--graphs", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--tau", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=0)
    parser.add_argument("--overlap", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--generator", type=int, default=0)
    parser.add_argument("--vae", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--kernels", type=int, default=0, help="print so many kernels of every case, and its gaps"
    )
    parser.add_argument("--shares", type=int, default=1, help="0: without the parts' shares, an eager step")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no case begins")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warmup < 0:
        parser.error(f"--steps {args.steps} --warmup {args.warmup}: give 1 or more, and 0 or more")
    cases = []
    for text in args.case or [""]:
        case = {key: getattr(args, key) for key in KEYS}
        for word in text.split():
            key, _, value = word.partition("=")
            if key not in KEYS or not value:
                parser.error(f"--case: {word!r} is not KEY=VALUE with a KEY of {', '.join(KEYS)}")
            try:
                case[key] = KEYS[key](value)
            except ValueError:
                parser.error(f"--case: {word!r} wants a whole number")
        cases.append(case)
    return args, cases


def launched(config: RunConfig, device: torch.device, dtype: torch.dtype) -> VaVae:
    """VA-VAE whose encoder's kernels the host issues one by one."""
    return common.online_vae_target(config.altered(train={"cuda_graphs": "off"}), device, dtype)


def measure(args: argparse.Namespace, case: dict[str, Any], world: int) -> dict[str, Any]:
    with switches.changed(**switched(case)):
        return _measured(args, case, world)


def _measured(args: argparse.Namespace, case: dict[str, Any], world: int) -> dict[str, Any]:
    config = configure(case, world)
    with quick_start({1: common.online_vae_target, 2: launched}.get(case["vae"])):
        bench = Bench(config)
    found: dict[str, Any] = {"measured": bench.measure(args.steps, args.warmup)}
    found["flops"] = flops.clip_flops(config, config.stages[0], executed=True).total
    if bench.cuda:
        with contextlib.suppress(RuntimeError):  # a profiler that cannot record costs the gaps alone
            found["activity"] = activity(bench.run)
    bench.step.close()
    if bench.cuda and case["shares"]:  # parts are told apart in an eager step
        torch.cuda.empty_cache()
        bench.step.engine.graphs = None
        with contextlib.suppress(torch.OutOfMemoryError):
            found["shares"] = shares(bench.step, bench.take)
    return found


def label(case: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """What tells the case from the others."""
    differing = [key for key in KEYS if len({each[key] for each in cases}) > 1]
    return " ".join(f"{key}={case[key]}" for key in differing) or "as said"


def failure(error: Exception) -> str:
    """What a case ended with, on one line. NCCL can't have what torch's allocator keeps unused."""
    text = str(error).strip() or "no message"
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, dist.DistBackendError) and "Failed to CUDA" in text:
        return f"out of memory, in NCCL: {text.splitlines()[-1][:60]!r}; lower micro_batch;"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text[:90]!r}; lower micro_batch;"
    return f"{type(error).__name__}: {text.splitlines()[0][:90]!r}"


def percent(share: float) -> str:
    return f"{'-':>6}" if math.isnan(share) else f"{share:>6.1%}"


def main() -> int:
    """0 if any case was measured, 2 if one can't be."""
    args, cases = parse()
    begun = time.perf_counter()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    try:
        for case in cases:
            check(case, world)
    except ConfigError as error:
        cli.fail(error)
    first, lines = None, []
    head = (
        f"{'clips/s':>8} {'ms':>8} {'MFU':>6} {'GiB':>6} {'ratio':>6} "
        + " ".join(f"{part[:6]:>6}" for part in (*PARTS, "other", "gaps"))
        + "  case"
    )
    for number, case in enumerate(cases):
        if not first_says(number, time.perf_counter() - begun <= args.limit):
            lines.append(f"not begun for want of time: {label(case, cases)}")
            continue
        join(number, alone=case["gpus"] == 1)
        try:
            found = measure(args, case, dist.get_world_size())
        except Exception as error:  # one case must not cost the others
            if rank == 0:
                traceback.print_exc(limit=-6)
            lines.append(f"{failure(error)} {label(case, cases)}")
            continue
        finally:
            leave()
        measured = found["measured"]
        rate = case["micro_batch"] * case["accumulate"] / measured.seconds / case["tensor"]
        first = first or rate
        seen = found.get("activity", Activity(math.nan, [], []))
        share = {**found.get("shares", {}), "gaps": seen.idle}
        lines.append(
            f"{rate:>8.2f} {1e3 * measured.seconds:>8.1f} {rate * found['flops'] / PEAK_BF16:>6.1%} "
            f"{measured.gib:>6.1f} {rate / first:>6.2f} "
            + " ".join(percent(share.get(part, math.nan)) for part in (*PARTS, "other", "gaps"))
            + f"  {label(case, cases)}"
        )
        if rank == 0:
            print(lines[-1], f"loss {measured.loss:.4f}, {time.perf_counter() - begun:.0f} s", flush=True)
            for name, ms, calls in seen.kernels[: args.kernels]:
                print(f"    {ms:>8.2f} ms {calls:>5} x  {name[:110]}")
            for ms, times, before, after in seen.waits[: min(args.kernels, WAITS)]:
                print(f"    {ms:>8.2f} ms {times:>5.1f} x  nothing, from {before[:48]} to {after[:48]}")
    if rank == 0:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"\n{world} x {name}, torch {torch.__version__}; {args.steps} steps after {args.warmup}")
        print({key: cases[0][key] for key in KEYS if len({each[key] for each in cases}) == 1})
        print("\n".join([head, *lines]))
    return 0 if first else 1


if __name__ == "__main__":
    sys.exit(main())
