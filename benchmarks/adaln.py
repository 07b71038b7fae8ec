"""Milliseconds of what stands between two branches of a DiT layer: torch.compile's pieces and our kernels.

    python benchmarks/adaln.py                         # one GPU; 40 s
    python benchmarks/adaln.py --search --limit 120    # and with other tiles

`fused.gated_norm` forward and backward, which a layer of the decoder calls twice, at ViT-G's width: rows of
256 tokens, 224 at micro-batch 16 and tau 1, 560 at 10 and tau 4. Compiled, the backward pass has the addition
of the residual's two gradients too, as in training. GB/s is of the bytes that one kernel each way must move,
the error the largest of outputs and gradients against fp32 over the tensor's norm; `other` counts plays whose
numbers were not the first's, to the bit. Times are of CUDA graphs. Without a GPU a few tokens go through
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import replay
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from nextvid_mcore import switches  # noqa: E402
from nextvid_mcore.models import fused, triton_adaln  # noqa: E402

ROWS = {"tau 1": 224, "tau 4": 560}
# tokens of a forward program, warps, tokens of a backward program (None: as shipped)
TILES = [(8, 4, None), (32, 4, None), (16, 4, 16), (16, 4, 32), (16, 4, 64), (16, 4, 88), (16, 4, 128)]
TILES += [(16, 4, 256), (16, 2, 32), (16, 8, 64)]
PLAYS = 100
DEVICE = torch.device("cuda" if CUDA else "cpu")


@contextlib.contextmanager
def by(kernels: bool) -> Iterator[None]:
    """Our kernels, or what is compiled."""
    compiles = fused.compiles
    fused.use(True)
    if not CUDA:
        fused.compiles = lambda x: kernels
    try:
        with switches.changed(gated_norm=kernels):
            yield
    finally:
        fused.compiles = compiles


class Case:
    """One shape's tensors."""

    def __init__(self, rows: int, width: int, tokens: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE, generator=generator).bfloat16()

        self.leaves = [draw(tokens, rows, width), draw(tokens, rows, width), draw(width)]
        self.leaves += [draw(1, rows, 6 * width)]
        self.grads = [draw(tokens, rows, width) for _ in range(2)]
        self.size = self.leaves[0].numel() * 2
        for x in self.leaves:
            x.requires_grad_()

    def forward(self, leaves: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        x, y, bias, vectors = leaves or self.leaves
        shift, scale, gate, *_ = vectors.chunk(6, dim=-1)
        return fused.gated_norm(x, fused.Added(y, bias, gate), shift, scale, 1e-6)

    def both(self) -> list[Tensor]:
        found = self.forward()
        return [*(x.detach() for x in found), *torch.autograd.grad(found, self.leaves, self.grads)]

    def wanted(self) -> list[Tensor]:
        leaves = [x.detach().float().requires_grad_() for x in self.leaves]
        with by(False), fused.eager():
            found = self.forward(leaves)
            return [x.detach() for x in found] + list(
                torch.autograd.grad(found, leaves, [x.float() for x in self.grads])
            )

    def error(self) -> float:
        pairs = zip(self.both(), self.wanted(), strict=True)
        return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)

    def others(self) -> int:
        """Of PLAYS plays, how many gave anything else than the first call."""
        first, count = self.both(), torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(PLAYS if CUDA else 1):
            differs = [(a != b).any() for a, b in zip(self.both(), first, strict=True)]
            count += torch.stack(differs).any()
        return count.item()


def figures(name: str, way: str, kernels: bool, case: Case, whole: bool = True) -> str:
    with by(kernels):
        forward = 1e3 * replay.seconds(case.forward, 8)
        backward = 1e3 * replay.seconds(case.both, 8) - forward
        rates = [4 * case.size / forward / 1e6, 6 * case.size / backward / 1e6]
        checks = f"{case.error():>8.1e} {case.others():>6}" if whole else ""
    times = " ".join(f"{ms:>8.4f} {rate:>6.0f}" for ms, rate in zip((forward, backward), rates, strict=True))
    return f"{name:<8} {way:<28} {times} {forward + backward:>8.4f} {checks}"


def tried(lines: list[str], *args: object) -> None:
    replay.tried(lines, args[:2], lambda: figures(*args))


def searched(lines: list[str], late: float, width: int, tokens: int) -> None:
    names = ("FORWARD_TOKENS", "WARPS")
    usual, share_of = [getattr(triton_adaln, name) for name in names], triton_adaln.share_of
    for shape, rows in ROWS.items():
        case = Case(rows if CUDA else 3, width, tokens)
        for *tile, share in TILES:
            if time.perf_counter() > late:
                break
            for name, value in zip(names, tile, strict=True):
                setattr(triton_adaln, name, value)
            chosen = share_of.__wrapped__ if share is None else lambda *_, share=share: share
            triton_adaln.share_of = chosen
            tried(lines, shape, f"tokens, warps, tokens {(*tile, share)}", True, case, False)
    triton_adaln.share_of = share_of
    for name, value in zip(names, usual, strict=True):
        setattr(triton_adaln, name, value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", action="store_true", help="try other tiles")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which no tile is tried")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    start, lines = time.perf_counter(), []
    if CUDA:
        from nextvid_mcore.training.graphs import own_stream

        own_stream()
    width, tokens = (args.width, args.tokens) if CUDA else (48, 9)
    for name, rows in ROWS.items():
        case = Case(rows if CUDA else 3, width, tokens)
        for way, kernels in (("ours", True), ("torch.compile", False)):
            tried(lines, name, way, kernels, case)
    if args.search:
        searched(lines, start + args.limit, width, tokens)
    device = torch.cuda.get_device_name() if CUDA else "CPU, interpreted"
    print(f"\n{device}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    header = f"{'forward':>8} {'GB/s':>6} {'backward':>8} {'GB/s':>6} {'both':>8} {'error':>8} {'other':>6}"
    print(f"{'shape':<8} {'by':<28} {header}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
