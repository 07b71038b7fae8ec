"""Whether attention's kernels give the same numbers every time: forward and backward, thousands of calls.

    python benchmarks/repeat.py vit_g:16:16 vit_g:64:4 digits:16:32 --seconds 30 --beside
    python benchmarks/repeat.py vit_g:16:16 --kernels adaln --seconds 30    # the decoder's norms and gates

A race between threads shows once in hundreds of calls, and more often beside other processes: a comparison
with fp32 that agrees proves little. Here a recorded pass is played again and again on the same inputs, its
memory painted with NaN before each half, and output and gradients are compared with the first call's, to the
bit. A case is recipe:frames:clips; all patterns of benchmarks/attention.py are run, each in a process of its
own, one after another or (`--beside`) all at once. Ends with 1 if a call differed. `adaln` is no attention:
the kernels of the decoder's AdaLN.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attention
import common  # noqa: F401  (puts the clone on the path)
import replay
import torch
from arguments import least
from torch import Tensor

from nextvid_mcore.models import kernels
from nextvid_mcore.models.attention import AttentionPattern
from nextvid_mcore.training.graphs import own_stream

PATTERNS = ("reference", "student", "predictor", "decoder")
KERNELS = ("gluon_stairs", "triton_stairs", "gluon_prefix", "triton_prefix", "flex", "adaln")
AT_ONCE = 50  # plays between two looks
DIFFERED = 3


def kernel_of(name: str, pattern: AttentionPattern | None, tokens: int) -> Callable[..., Tensor] | None:
    """(q, k, v) -> output; None where the kernel isn't for that pattern."""
    if name == "flex":
        return None if pattern is None else lambda q, k, v: kernels.flex(q, k, v, pattern)
    stairs = ((0, 0, 1, tokens, tokens),) if pattern is None else pattern.stairs
    frame = None if pattern is None else pattern.prefix
    if (frame if name.endswith("prefix") else stairs) is None:
        return None
    if name.startswith("gluon") and torch.cuda.get_device_capability() != kernels.HOPPER:
        return None
    attend = importlib.import_module(f"nextvid_mcore.models.{name}").attend
    return lambda q, k, v: attend(q, k, v, frame if name.endswith("prefix") else stairs)


def attended(case: tuple, call: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
    """out, dq, dk and dv of `call` on inputs of the case's shape; out alone where no gradient is wanted."""
    _, rows, count, width, queries, keys, _, backward = case
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def packed(s: int, parts: int) -> list[Tensor]:
        """As a linear gives them: the parts of a head side by side."""
        x = attention.heads(rows, s, count, parts * width, device, generator)
        return list((x if backward else x.detach()).unflatten(3, (parts, width)).unbind(3))

    leaves = packed(queries, 3) if queries == keys else packed(queries, 1) + packed(keys, 2)
    grad = attention.heads(rows, queries, count, width, device, generator).detach()

    def once() -> list[Tensor]:
        sums = torch.empty(rows * count, queries, device=device)
        paint([leaves[0].detach(), sums])
        out = call(*leaves)
        if not backward:
            return [out]
        paint([x.detach() for x in leaves])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return once


def modulated(rows: int, width: int, tokens: int) -> Callable[[], list[Tensor]]:
    """Outputs and gradients of `fused.gated_norm`."""
    import adaln

    case = adaln.Case(rows, width, tokens)
    x = case.leaves[0].detach()

    def once() -> list[Tensor]:
        sums = torch.empty(2 * rows * tokens, device="cuda")
        paint([x, x, sums])
        out = case.forward()
        paint([x, x])
        return [*(z.detach() for z in out), *torch.autograd.grad(out, case.leaves, case.grads)]

    return once


def paint(like: list[Tensor]) -> None:
    """NaN in the memory that the next tensors of these sizes get."""
    painted = [torch.full_like(x, float("nan")) for x in like for _ in range(2)]
    del painted


def repeat(once: Callable[[], list[Tensor]], seconds: float) -> tuple[int, list[int], list[int], str]:
    """Calls, of how many each result (out, dq, dk, dv) was not finite or another, and where it first was."""
    first = [x.clone() for x in once()]
    found = [torch.empty_like(x) for x in first]
    broken, other = (torch.zeros(len(first), dtype=torch.int64, device="cuda") for _ in range(2))

    def play() -> None:
        for i, (x, y, kept) in enumerate(zip(once(), first, found, strict=True)):
            finite = torch.isfinite(x).all()
            broken[i] += ~finite
            # the first that differs stays to be looked at
            new = (other[i] == 0) & (x != y).any()
            other[i] += (x != y).any()
            kept.copy_(torch.where(new, x, kept))

    graph = replay.recorded(play)
    broken.zero_(), other.zero_()
    calls, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(AT_ONCE):
            graph.replay()
        torch.cuda.synchronize()
        calls += AT_ONCE
    where = ""
    for i, (n, x, y) in enumerate(zip(other.tolist(), found, first, strict=True)):
        if n:
            at = (x != y).nonzero()
            where += f" {i} at {at[0].tolist()} to {at[-1].tolist()} ({len(at)} values)"
    return calls, broken.tolist(), other.tolist(), where


def suits(kernel: str, pattern: str) -> bool:
    if kernel in ("flex", "adaln"):
        return (kernel == "adaln") == (pattern == "decoder")
    return (pattern == "reference") == kernel.endswith("prefix")


def one(args: argparse.Namespace) -> int:
    """A case's pattern with a kernel, in this process: a line; 0 if every call gave the same."""
    recipe, frames, clips = args.cases[0].split(":")
    own_stream()
    device = torch.device("cuda")
    found = attention.cases(argparse.Namespace(recipe=recipe, tau=1), int(frames), int(clips), device)
    case = next(x for x in found if x[0] == args.only[0])
    if args.kernels[0] == "adaln":
        once = modulated(case[1], case[2] * case[3], case[4])
    else:
        call = kernel_of(args.kernels[0], case[6], case[4])
        if call is None:
            raise SystemExit(f"{args.kernels[0]} is not for the {case[0]}'s pattern here")
        once = attended(case, call)
    calls, broken, other, where = repeat(once, args.seconds)
    name = f"{args.cases[0]:<14} {case[0]:<10} {args.kernels[0]:<14}"
    print(f"{name} {calls:>8} {sum(broken):>10} {sum(other):>10}{where}", flush=True)
    return DIFFERED if sum(other) else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["vit_g:16:16"], metavar="RECIPE:FRAMES:CLIPS")
    parser.add_argument("--only", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:1])
    parser.add_argument("--seconds", type=least(0, float), default=20, help="of each")
    parser.add_argument("--beside", action="store_true", help="all at once")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is visible")
    if args.one:
        sys.exit(one(args))
    print(f"{'case':<14} {'pattern':<10} {'kernel':<14} {'calls':>8} {'not finite':>10} {'different':>10}")
    runs = [
        [case, "--only", pattern, "--kernels", kernel]
        for case in args.cases
        for kernel in args.kernels
        for pattern in args.only
        if suits(kernel, pattern)
    ]
    command = [sys.executable, str(Path(__file__).resolve()), "--one", "--seconds", str(args.seconds)]
    with ThreadPoolExecutor(len(runs) if args.beside else 1) as threads:
        done = list(threads.map(lambda run: subprocess.run([*command, *run], stderr=-1, text=True), runs))
    failed = 0
    for run, process in zip(runs, done, strict=True):
        failed += process.returncode != 0
        if process.returncode not in (0, DIFFERED):
            print(f"{' '.join(run)}: {(process.stderr.strip().splitlines() or ['died'])[-1][:200]}")
    print(f"{torch.cuda.get_device_name()}; {failed} of {len(runs)} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
