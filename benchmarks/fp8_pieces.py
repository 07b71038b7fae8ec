"""Milliseconds and GB/s of what writes FP8 (models/triton_fp8.py) against quantising later.

    python benchmarks/fp8_pieces.py                        # one GPU; about a minute and a half
    python benchmarks/fp8_pieces.py --parts both turn

ViT-G at micro-batch 16: 16,128 student and 32,768 reference tokens of 1,408 values, in MLPs 6,144, in heads
22 x 64. The tiles that are tried print their times; bytes are those that must be moved.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nextvid_mcore.models import fused, triton_fp8  # noqa: E402 (the clone is put on the path first)

TILES = [(128, 64, 8), (64, 128, 8), (64, 64, 4), (128, 64, 4), (128, 32, 4), (256, 32, 8)]
ROWS = [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
PARTS = ("norms", "mlps", "both", "turn")
BOTHS = [(16, 128, 8), (32, 128, 8), (32, 64, 4), (64, 128, 8), (16, 128, 4), (16, 256, 8)]
TURNS = [(64, 8, 8, 128), (64, 22, 8, 128), (64, 4, 8, 128), (32, 8, 8, 0), (32, 8, 4, 0)]
FLATS = [(16, 512, 8), (8, 512, 8), (32, 256, 8), (32, 512, 8), (16, 1024, 8), (16, 256, 4)]


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def show(name: str, run: Callable[[], object], count: int) -> None:
    """count: bytes that the work must move."""
    try:
        ms = milliseconds(run)
        print(f"{ms:>8.3f} ms {count / ms / 1e6:>6.0f} GB/s  {name}", flush=True)
    except Exception:
        print(f"failed: {name}")
        traceback.print_exc(limit=-3)


def quantiser(dtype: str, columns: bool):
    """Transformer Engine's for `delayed`."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    scale, amax = torch.tensor(20.0, device="cuda"), torch.zeros(1, device="cuda")
    made = Float8Quantizer(scale, amax, TE_DType[getattr(torch, dtype)], columnwise=columns)
    made.internal = True
    return made


def norms(rows: int, width: int = 1408) -> None:
    """The reference's norms, with the addition before: [rows, 1408]."""
    x, y = (torch.randn(rows, 1, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias, low = torch.zeros(width, device="cuda", dtype=torch.bfloat16), quantiser("float8_e4m3fn", False)
    module = torch.nn.LayerNorm(width, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        show("add, norm in bf16", lambda: fused.add_norm(x, y, bias, module, 1e-6), 8 * x.numel())
        show("quantise it", lambda: low(x[:, 0]), 3 * x.numel())
        for at_once, warps in ROWS:
            triton_fp8.ROW = {"BR": at_once, "num_warps": warps}
            show(
                f"add, norm to FP8, {at_once} rows at once, {warps} warps",
                lambda: triton_fp8.norm(
                    x[:, 0], y[:, 0], bias, module.weight, module.bias, 1e-6, low.scale, low.amax,
                    torch.float8_e4m3fn,
                ),
                7 * x.numel(),
            )  # fmt: skip


def both_directions(rows: int, width: int = 1408) -> None:
    """The student's norms, without and with the addition before: [rows, 1408]."""
    x, y = (torch.randn(rows, 1, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias, low = torch.zeros(width, device="cuda", dtype=torch.bfloat16), quantiser("float8_e4m3fn", True)
    module = torch.nn.LayerNorm(width, device="cuda", dtype=torch.bfloat16)
    parameters = module.weight.detach(), module.bias.detach(), 1e-6
    with torch.no_grad():
        show("norm in bf16", lambda: fused.norm(x, module, 1e-6), 4 * x.numel())
        show("add, norm in bf16", lambda: fused.add_norm(x, y, bias, module, 1e-6), 8 * x.numel())
        show("quantise it, both directions", lambda: low(x[:, 0]), 4 * x.numel())
        for br, bc, warps in BOTHS:
            triton_fp8.BOTH = {"BR": br, "BC": bc, "num_warps": warps}
            for name, added, count in (("norm", (None, None), 4), ("add, norm", (y[:, 0], bias), 8)):
                show(
                    f"{name} in both directions, {br} x {bc}, {warps} warps",
                    lambda added=added: triton_fp8.norm_both(
                        x[:, 0], *added, *parameters, low.scale, low.amax, torch.float8_e4m3fn
                    ),
                    count * x.numel(),
                )


def rotation(tokens: int, heads: int = 22, width: int = 64) -> None:
    """Back through the student's rotary positions."""
    from nextvid_mcore.models import triton_pieces

    grads = torch.randn(3, tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.rand(2, tokens, 30, device="cuda")
    packed, low = torch.empty_like(grads).view(tokens, heads, 3, width), quantiser("float8_e5m2", True)
    show(
        "rotation back in bf16",
        lambda: triton_pieces.turn(list(grads), packed, cos, sin, True),
        4 * grads.numel(),
    )
    show("quantise it, both directions", lambda: low(packed.view(tokens, -1)), 4 * grads.numel())
    for bt, at_once, warps, registers in TURNS:
        triton_fp8.TURN = {"BT": bt, "HEADS": at_once, "num_warps": warps}
        triton_fp8.TURN |= {"maxnreg": registers} if registers else {}
        show(
            f"rotation back to FP8, {bt} tokens, {at_once} heads, {warps} warps",
            lambda: triton_fp8.turn_backward(list(grads), cos, sin, low.scale, low.amax, torch.float8_e5m2),
            4 * grads.numel(),
        )


def mlps(args: argparse.Namespace) -> None:
    bias = torch.randn(args.width, device="cuda", dtype=torch.bfloat16)
    scale, amax = torch.tensor(20.0, device="cuda"), torch.zeros(1, device="cuda")
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for rows, columns in ((args.student, True), (args.reference, False)):
        x = torch.randn(rows, 1, args.width, device="cuda", dtype=torch.bfloat16)
        flat, size = x[:, 0], x.numel()
        low = quantiser("float8_e4m3fn", columns)
        with torch.no_grad():
            show(f"GELU in bf16 {rows}", lambda x=x: fused.bias_gelu(x, bias), 4 * size)
            show(f"quantise {rows} columns={columns}", lambda: low(flat), (3 + columns) * size)  # noqa: B023
        name = "TILE" if columns else "FLAT"
        for br, bc, warps in TILES if columns else FLATS:
            setattr(triton_fp8, name, {"BR": br, "BC": bc, "num_warps": warps})
            show(
                f"GELU to FP8 {rows} columns={columns} tile {br} x {bc}, {warps} warps",
                lambda: triton_fp8.gelu(flat, bias, scale, amax, e4m3, columns),  # noqa: B023
                (3 + columns) * size,
            )
        if not columns:
            continue
        dy, leaf = torch.randn_like(x), x.clone().requires_grad_()
        y = fused.bias_gelu(leaf, bias.requires_grad_())
        low = quantiser("float8_e5m2", True)
        show(
            "derivative in bf16, with the bias's",
            lambda: torch.autograd.grad(y, (leaf, bias), dy, retain_graph=True),  # noqa: B023
            6 * size,
        )
        show("quantise it", lambda: low(dy[:, 0]), 4 * size)  # noqa: B023
        for br, bc, warps in TILES:
            triton_fp8.BACK = {"BR": br, "BC": bc, "num_warps": warps}
            show(
                f"derivative to FP8 tile {br} x {bc}, {warps} warps",
                lambda: triton_fp8.gelu_backward(dy[:, 0], flat, bias, scale, amax, e5m2),  # noqa: B023
                6 * size,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--width", type=int, default=6144)
    parser.add_argument("--student", type=int, default=16128)
    parser.add_argument("--reference", type=int, default=32768)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, and nothing here runs without")
    print(torch.cuda.get_device_name(), torch.__version__)
    work = {
        "norms": lambda: norms(args.reference),
        "mlps": lambda: mlps(args),
        "both": lambda: both_directions(args.student),
        "turn": lambda: rotation(args.student),
    }
    for part in args.parts:
        try:
            work[part]()
        except Exception:
            traceback.print_exc(limit=-3)


if __name__ == "__main__":
    main()
