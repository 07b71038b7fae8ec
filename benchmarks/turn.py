"""Milliseconds and GB/s of rotary turns (models/triton_pieces.py), forward and backward, in bf16.

    python benchmarks/turn.py                       # one GPU; 20 s
    python benchmarks/turn.py --search --limit 90   # and with other tiles

Shapes: ViT-G's student and reference, decoder and predictor, micro-batch 16, tau 1. Bytes are those that must
be moved: forward what is turned, backward everything, and the cosines and sines. Beside them a plain copy of
as many bytes, and for as many shapes as the time allows what torch.compile makes of fused.py's reference (it
copies the values forward too). Times are of a CUDA graph over more memory than the GPU caches. The error is
the largest of any value, over the largest value, against fp32. Without a GPU a few tokens go through Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
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

from nextvid_mcore import rope  # noqa: E402
from nextvid_mcore.models import fused, triton_pieces  # noqa: E402

# tokens, heads, width of a head, parts, backward too
SHAPES = {
    "decoder": (57344, 12, 32, 3, True),
    "student": (16 * 1008, 22, 64, 3, True),
    "reference": (16 * 2048, 22, 64, 3, False),
    "predictor's queries": (57344, 12, 32, 1, True),
    "predictor's keys, values": (16 * 1008, 12, 32, 2, True),
}
TILES = [(16, 8, 2), (16, 8, 3), (16, 4, 1), (16, 24, 1), (32, 8, 1), (32, 8, 2), (64, 8, 1)]
CACHED = 200 << 20  # bytes; an H100's L2 is 50 MiB
DEVICE = torch.device("cuda" if CUDA else "cpu")


def reference(parts: Sequence[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """[N, A, d] each -> [N, A, parts, d], queries and keys turned; with -sin: the backward pass."""
    turned = len(parts) - (len(parts) > 1)
    found = [fused._rotate(x, cos[:, None], sin[:, None]) for x in parts[:turned]]
    return torch.stack((*found, *parts[turned:]), 2)


class Case:
    """One shape's tensors, several times over."""

    def __init__(self, name: str) -> None:
        tokens, self.heads, self.width, self.parts, self.backward = SHAPES[name]
        self.tokens = tokens if CUDA else 40
        self.size = self.tokens * self.heads * self.width * 2  # bytes of a part
        generator = torch.Generator(DEVICE).manual_seed(0)
        shape = (self.tokens, self.heads, self.parts, self.width)
        copies = -(-CACHED // (self.size * self.parts)) if CUDA else 1
        draw = functools.partial(torch.randn, device=DEVICE, generator=generator, dtype=torch.bfloat16)
        self.packed = [draw(shape) for _ in range(copies)]
        self.grads = [[draw(shape[:2] + shape[3:]) for _ in range(self.parts)] for _ in range(copies)]
        positions = rope.token_positions(torch.arange(self.tokens, device=DEVICE) % 2048, 16, 16)
        self.cos, self.sin = rope.turns(rope.angles(positions, self.width))

    def bytes(self, back: bool) -> int:
        moved = self.parts if back or self.parts == 1 else self.parts - 1
        return 2 * moved * self.size + 2 * 4 * self.cos.numel()

    def inputs(self, i: int, back: bool) -> Sequence[Tensor]:
        return self.grads[i] if back else self.packed[i].unbind(2)

    def turn(self, i: int, back: bool) -> None:
        triton_pieces.turn(self.inputs(i, back), self.packed[i], self.cos, self.sin, back)

    def compiled(self, i: int, back: bool, function: Callable) -> None:
        function(self.inputs(i, back), self.cos, -self.sin if back else self.sin)

    def error(self, back: bool) -> float:
        """Of a turn of the first copy."""
        inputs = [x.float() for x in self.inputs(0, back)]
        wanted = reference(inputs, self.cos, -self.sin if back else self.sin)
        self.turn(0, back)
        return ((self.packed[0].float() - wanted).abs().max() / wanted.abs().max()).item()

    def copy(self, back: bool) -> Callable[[int], None]:
        count = self.bytes(back) // 4
        copies = max(2, -(-CACHED // (2 * count))) if CUDA else 2
        pool = [torch.ones(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
        return lambda i: pool[i % copies].copy_(pool[(i + 1) % copies])


def milliseconds(run: Callable[[int], object], copies: int) -> float:
    """Of one call, the median of eight plays of a graph that calls it for every copy twice."""
    calls = 2 * copies if CUDA else 1  # a CPU has one copy, and time for one call

    def work() -> None:
        for i in range(calls):
            run(i % copies)

    return 1e3 * replay.seconds(work, 8) / calls


def figures(name: str, what: str, by: str, case: Case, back: bool, run: Callable[[int], object]) -> str:
    ms = milliseconds(run, len(case.packed))
    worst = f"{case.error(back):.1e}" if by == "triton" else ""
    rate = case.bytes(back) / ms / 1e6
    return f"{name:<25} {what:<9} {by:<26} {ms:>8.4f} {rate:>6.0f} {worst:>8}"


def tried(lines: list[str], *args: object) -> None:
    replay.tried(lines, args[:3], lambda: figures(*args))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", action="store_true", help="try other tiles on the first two shapes")
    parser.add_argument("--limit", type=float, default=18, help="seconds after which nothing is begun")
    args = parser.parse_args()
    start, lines = time.perf_counter(), []

    def late() -> bool:
        return time.perf_counter() - start > args.limit

    with torch.no_grad():
        for name, (*_, backward) in SHAPES.items():
            case = Case(name)
            for back in (False, True)[: 1 + backward]:
                what = ("forward", "backward")[back]
                tried(lines, name, what, "triton", case, back, functools.partial(case.turn, back=back))
                tried(lines, name, what, "plain copy", case, back, case.copy(back))
        names = list(SHAPES)[:2]
        for name, back in itertools.product(names, (False, True)) if args.search else ():
            case, usual = (
                Case(name),
                {x: getattr(triton_pieces, x) for x in dir(triton_pieces) if x[:5] == "TURN_"},
            )
            for tile in TILES:
                if late():
                    break
                for key, value in zip(("TURN_TOKENS", "TURN_HEADS", "TURN_STAGES"), tile, strict=True):
                    setattr(triton_pieces, key, value)
                by, what = f"tokens, heads, stages {tile}", ("forward", "backward")[back]
                tried(lines, name, what, by, case, back, functools.partial(case.turn, back=back))
            for key, value in usual.items():
                setattr(triton_pieces, key, value)
        for name, back in itertools.product(SHAPES, (False, True)):
            if late() or (back and not SHAPES[name][-1]):
                continue
            case = Case(name)
            function = fused.compile_(reference) if CUDA else reference
            run = functools.partial(case.compiled, back=back, function=function)
            tried(lines, name, ("forward", "backward")[back], "torch.compile", case, back, run)
    device = torch.cuda.get_device_name() if CUDA else "CPU, interpreted"
    print(f"\n{device}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    print(f"{'shape':<25} {'pass':<9} {'by':<26} {'ms':>8} {'GB/s':>6} {'error':>8}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
