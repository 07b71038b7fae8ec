"""Which attention kernel is fastest for each network's pattern: forward, and forward with backward.

    python benchmarks/attention.py --recipe vit_g --frames 16 64 --micro-batch 16 4

Patterns: the reference encoder (a whole clip, frame-causal), the student (both masks), the predictor (queries
of every frame on earlier frames' context) and the decoder (frames in rows of their own, no mask). Times are
of a CUDA graph, as a recorded step runs them. Rates count useful work alone: pairs of query and key that see
each other, 4 FLOPs a pair and channel forward, 10 more backward. Every kernel is first compared with fp32
attention on the same numbers.
"""

from __future__ import annotations

import argparse
import functools
import time
import traceback
from collections.abc import Callable

import common  # noqa: F401  (puts the clone on the path)
import replay
import torch
import torch.nn.functional as F
from arguments import least
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextvid_mcore import cli, recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.models import kernels
from nextvid_mcore.models.attention import AttentionPattern, Frames, regular_pattern
from nextvid_mcore.training.graphs import own_stream


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, pattern: None) -> Tensor:
    """Not for training: models/sdpa.py says why."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def flex_of(block: int) -> Callable:
    """FlexAttention with blocks of `block` tokens; inductor measures its tile sizes and takes the best."""
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(
        kernels.flex_attention, dynamic=False, fullgraph=True, options={"max_autotune": True}
    )

    @functools.cache
    def blocks(pattern: AttentionPattern) -> object:
        return kernels.flex_blocks(pattern.stretches, block)

    def call(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
        return compiled(q, k, v, block_mask=blocks(pattern))

    return call


def triton_stairs(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    from nextvid_mcore.models import triton_stairs  # Triton isn't there without a GPU

    return triton_stairs.attend(q, k, v, pattern.stairs)


def kernels_of(case: tuple, searched: bool) -> dict[str, Callable]:
    pattern = case[6]
    if not torch.cuda.is_available():
        return {"sdpa": kernels.plain} if pattern is None else {"masked": kernels.masked}
    if pattern is None:
        return {"stairs": kernels.whole, "sdpa": kernels.plain, "cudnn": by_cudnn}
    tried = {"stairs": kernels.stairs, "stairs, Triton": triton_stairs} if pattern.stairs else {}
    tried |= {"flex": kernels.flex, "masked": kernels.masked}
    if searched:
        tried |= {"flex 128 searched": flex_of(128), "flex 64 searched": flex_of(64)}
    return tried


def cases(args: argparse.Namespace, frames: int, b: int, device: torch.device) -> list[tuple]:
    """(name, rows, heads, head width, queries, keys, pattern, with backward)."""
    config = recipes.get(args.recipe)
    model = config.model
    n, t = model.tokens_per_frame, model.token_frames(frames)
    counts = config.mask.counts(n)
    whole = (Frames(0, t, n),)
    visible = tuple(Frames(0, t - 1, v) for v in counts)
    asked = (Frames(1, t - 1, n),) * len(counts)
    s, q = (t - 1) * sum(counts), (t - 1) * n * len(counts)
    e, p, d = model.encoder, model.predictor, model.decoder
    causal = functools.partial(regular_pattern, rule="causal", device=device)
    return [
        ("reference", b, e.heads, e.head_width, t * n, t * n, causal(whole, whole), False),
        ("student", b, e.heads, e.head_width, s, s, causal(visible, visible), True),
        (
            "predictor",
            b,
            p.heads,
            p.head_width,
            q,
            s,
            regular_pattern(asked, visible, "autoregressive", device),
            True,
        ),
        ("decoder", b * (t - 1) * len(counts) * args.tau, d.heads, d.head_width, n, n, None, True),
    ]


def heads(
    rows: int, s: int, count: int, width: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Random [rows, A, s, d] on memory [s, rows, A, d], as the networks have it."""
    x = torch.randn(s, rows, count, width, device=device, dtype=torch.bfloat16, generator=generator)
    return x.permute(1, 2, 0, 3).requires_grad_()


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def measure(case: tuple, kernel: Callable, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds forward, seconds with backward, and the largest relative error of output and gradients."""
    _, rows, count, width, queries, keys, pattern, backward = case
    # a generator of its own: a recording that broke off leaves torch's in the midst of it
    made = functools.partial(heads, device=device, generator=torch.Generator(device).manual_seed(0))
    q = made(rows, queries, count, width)
    k, v = (made(rows, keys, count, width) for _ in range(2))
    grad = made(rows, queries, count, width).detach()

    out = kernel(q, k, v, pattern)
    one = [x.detach()[:1].float().requires_grad_() for x in (q, k, v)]
    wanted = (kernels.plain if pattern is None else kernels.masked)(*one, pattern)
    worst = error(out[:1], wanted)
    if backward:
        found = torch.autograd.grad(out, (q, k, v), grad)
        wanted = torch.autograd.grad(wanted, one, grad[:1].float())
        worst = max(worst, *(error(x[:1], y) for x, y in zip(found, wanted, strict=True)))

    def forward() -> None:
        with torch.no_grad():
            kernel(q, k, v, pattern)

    def both() -> None:
        torch.autograd.grad(kernel(q, k, v, pattern), (q, k, v), grad)

    timed = functools.partial(replay.seconds, repeats=repeats)
    return timed(forward), timed(both) if backward else float("nan"), worst


def figures(case: tuple, kernel: str, call: Callable, frames: int, repeats: int, device: torch.device) -> str:
    """One line of the table."""
    name, b, count, width, queries, keys, pattern, _ = case
    line = f"{name:<10} {frames:>3} {kernel:<17}"
    start = time.perf_counter()
    pairs = queries * keys if pattern is None else sum(x.allowed.sum().item() for x in pattern.stretches)
    work = 4 * pairs * b * count * width
    try:
        forward, both, worst = measure(case, call, repeats, device)
    except Exception as problem:  # one kernel's refusal must not cost the others' figures
        traceback.print_exc(limit=6)
        return f"{line} {type(problem).__name__}: {str(problem)[:90]!r}"
    return (
        f"{line} {1e3 * forward:>9.3f} {work / forward / 1e12:>8.0f} {1e3 * both:>9.3f} "
        f"{3.5 * work / both / 1e12:>8.0f} {worst:>9.1e} {time.perf_counter() - start:>6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vit_g", choices=recipes.names())
    parser.add_argument("--frames", type=least(1), nargs="+", default=[16])
    parser.add_argument(
        "--micro-batch", type=least(1), nargs="+", default=[16], help="one a number of frames"
    )
    parser.add_argument("--tau", type=least(1), default=1)
    parser.add_argument("--repeats", type=least(1), default=10)
    parser.add_argument("--only", nargs="+", help="patterns to measure")
    parser.add_argument("--kernels", nargs="+", help="kernels to measure")
    parser.add_argument("--searched", action="store_true", help="FlexAttention's tiles searched: 30 s a line")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no line begins"
    )
    args = parser.parse_args()
    if len(args.frames) != len(args.micro_batch):
        parser.error(f"--frames {args.frames} --micro-batch {args.micro_batch}: give as many of both")
    try:
        for frames in args.frames:
            recipes.get(args.recipe).model.token_frames(frames)
    except ConfigError as error:
        cli.fail(error)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        own_stream()
    begun, lines, all_cases = time.perf_counter(), {}, []
    for frames, b in zip(args.frames, args.micro_batch, strict=True):
        all_cases += [
            (frames, x) for x in cases(args, frames, b, device) if not args.only or x[0] in args.only
        ]
    names = dict.fromkeys(name for _, case in all_cases for name in kernels_of(case, args.searched))
    print(f"patterns ready after {time.perf_counter() - begun:.0f} s", flush=True)
    for kernel in names:  # of every pattern, then the next: ours first
        for i, (frames, case) in enumerate(all_cases):
            call = kernels_of(case, args.searched).get(kernel)
            if call is None or (args.kernels and kernel not in args.kernels):
                continue
            if time.perf_counter() - begun > args.limit:
                lines[i, kernel] = (
                    f"{case[0]:<10} {frames:>3} {kernel:<17} not begun within {args.limit:.0f} s"
                )
                continue
            lines[i, kernel] = figures(case, kernel, call, frames, args.repeats, device)
            print(lines[i, kernel], flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"\n{args.recipe}, micro-batch {args.micro_batch}, bf16, one layer, CUDA graph; {name}")
    print(
        f"{'pattern':<10} {'fr':>3} {'kernel':<17} {'fwd ms':>9} {'TFLOP/s':>8} {'f+b ms':>9} {'TFLOP/s':>8} "
        f"{'error':>9} {'all s':>6}"
    )
    print("\n".join(lines[key] for key in sorted(lines, key=lambda x: x[0])))


if __name__ == "__main__":
    main()
