"""Which attention kernel is fastest for each network's pattern: forward, and forward with backward.

    python benchmarks/attention.py --recipe vit_g --micro-batch 16

Patterns: the reference encoder (a whole clip, frame-causal), the student (both masks), the predictor (queries
of every frame on earlier frames' context) and the decoder (frames in rows of their own, no mask). Rates count
useful work alone: pairs of query and key that see each other, 4 FLOPs a pair and channel forward, 10 more
backward. Every kernel is first compared with fp32 attention on the same numbers.
"""

from __future__ import annotations

import argparse
import functools
import time
import traceback
from collections.abc import Callable

import common  # noqa: F401  (puts the clone on the path)
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextvid_mcore import recipes
from nextvid_mcore.models import kernels
from nextvid_mcore.models.attention import AttentionPattern, Frames, regular_pattern

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def with_backend(function: Callable, backend: str) -> Callable:
    def call(*args: object) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return function(*args)

    return call


def flex_of(block: int, tuned: bool, kernel_options: dict | None = None) -> Callable:
    """FlexAttention with blocks of `block`; tuned: inductor measures its tile sizes and takes the best."""
    torch._dynamo.config.recompile_limit = 64
    options = {"max_autotune": True} if tuned else None
    compiled = torch.compile(kernels.flex_attention, dynamic=False, fullgraph=True, options=options)

    @functools.cache
    def blocks(pattern: AttentionPattern) -> object:
        return kernels.flex_blocks(pattern.stretches, block)

    def call(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
        return compiled(q, k, v, block_mask=blocks(pattern), kernel_options=kernel_options)

    return call


def cases(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """(name, rows, heads, head width, queries, keys, pattern, with backward)."""
    config = recipes.get(args.recipe)
    model, b = config.model, args.micro_batch
    n, t = model.tokens_per_frame, model.token_frames(args.frames)
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


def heads(rows: int, s: int, count: int, width: int, device: torch.device) -> Tensor:
    """Random [rows, A, s, d] on memory [s, rows, A, d], as the networks have it."""
    x = torch.randn(s, rows, count, width, device=device, dtype=torch.bfloat16)
    return x.permute(1, 2, 0, 3).requires_grad_()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time on the device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def measure(case: tuple, kernel: Callable, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds forward, seconds with backward, and the largest relative error of output and gradients."""
    _, rows, count, width, queries, keys, pattern, backward = case
    torch.manual_seed(0)
    q = heads(rows, queries, count, width, device)
    k, v = (heads(rows, keys, count, width, device) for _ in range(2))
    grad = heads(rows, queries, count, width, device).detach()

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

    return seconds(forward, repeats), seconds(both, repeats) if backward else float("nan"), worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vit_g", choices=recipes.names())
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--tau", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="+", help="patterns to measure")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for case in cases(args, device):
        name, b, count, width, queries, keys, pattern, _ = case
        if args.only and name not in args.only:
            continue
        pairs = queries * keys if pattern is None else sum(x.allowed.sum().item() for x in pattern.stretches)
        work = 4 * pairs * b * count * width
        if pattern is None:
            tried = {x: with_backend(kernels.plain, x) for x in BACKENDS} if device.type == "cuda" else {}
            tried = tried or {"sdpa": kernels.plain}
        else:
            tried = {"masked sdpa": kernels.masked}
            if device.type == "cuda":
                tried |= {
                    "masked cudnn": with_backend(kernels.masked, "cudnn"),
                    "flex 128": flex_of(128, False),
                    "flex, ours": flex_of(128, False, kernels.HOPPER_TILES),
                    "flex 128 tuned": flex_of(128, True),
                    "flex 64 tuned": flex_of(64, True),
                }
        for kernel, call in tried.items():
            start = time.perf_counter()
            try:
                forward, both, worst = measure(case, call, args.repeats, device)
            except Exception as problem:  # one kernel's refusal must not cost the others' figures
                traceback.print_exc(limit=3)
                rows.append(f"{name:<10} {kernel:<14} {type(problem).__name__}: {str(problem)[:80]!r}")
                continue
            rows.append(
                f"{name:<10} {kernel:<14} {1e3 * forward:>9.3f} {work / forward / 1e12:>8.0f} "
                f"{1e3 * both:>9.3f} {3.5 * work / both / 1e12:>8.0f} {worst:>9.1e} "
                f"{time.perf_counter() - start:>6.1f}"
            )
            print(rows[-1], flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"\n{args.recipe}, {args.frames} frames, micro-batch {args.micro_batch}, bf16, one layer; {name}")
    print(
        f"{'pattern':<10} {'kernel':<14} {'fwd ms':>9} {'TFLOP/s':>8} {'f+b ms':>9} {'TFLOP/s':>8} "
        f"{'error':>9} {'all s':>6}"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
