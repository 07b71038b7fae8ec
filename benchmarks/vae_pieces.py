"""Milliseconds of the pieces of VA-VAE's fused encoder, at every resolution: its norms and its convolutions.

    python benchmarks/vae_pieces.py                  # one GPU; 40 s
    python benchmarks/vae_pieces.py --plays 3000     # and every piece so often, to the bit

A norm (targets/triton_vae.py) beside a copy of what it is of, where whole images wait for each other, or
shares of 64 channels; a convolution by torch without its bias, by torch and then its residual, and by cuDNN
with both (targets/cudnn_conv.py). `other` counts plays whose numbers were not the first's. Without a GPU a
small image goes through Triton's interpreter, and torch. Times are of CUDA graphs.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import common  # noqa: E402, F401  (puts the clone on the path)
import replay  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from arguments import least  # noqa: E402
from torch import Tensor  # noqa: E402

from nextvid_mcore.targets import triton_vae  # noqa: E402
from nextvid_mcore.targets.cudnn_conv import convolve  # noqa: E402
from nextvid_mcore.targets.triton_vae import Tuning, nchw, nhwc, normalise  # noqa: E402

SHAPES = (
    [(256, 128), (128, 128), (64, 256), (32, 256), (16, 512)] if CUDA else [(16, 128)]
)  # places, channels
# what waits for each other: as shipped; half and twice the programs; whole images
CUTS = {
    "64 channels": (64, Tuning()),
    "64 channels, slices doubled": (64, Tuning(slice=32768, together=64)),
    "64 channels, slices halved": (64, Tuning(slice=8192, together=256)),
    "whole images": (1 << 20, Tuning(slice=32768, together=256)),
}
DEVICE = torch.device("cuda" if CUDA else "cpu")


def others(work: Callable[[], Tensor], plays: int) -> int:
    """Of `plays` calls, how many gave anything else than the first."""
    first, count = work(), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(plays):
        count += (work() != first).any()
    return count.item()


def pieces(frames: int, size: int, channels: int) -> dict[str, Callable[[], Tensor]]:
    """By name, with tensors of bf16; no piece changes what it is of."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).bfloat16()

    x, rest = draw(frames, size, size, channels), draw(frames, size, size, channels)
    weight, shift, bias = draw(channels), draw(channels), draw(channels)
    window = (draw(channels, 3, 3, channels) / (3 * channels**0.5)).permute(0, 3, 1, 2)

    def norm(share: int, tuning: Tuning) -> Tensor:
        before, triton_vae.SHARE = triton_vae.SHARE, share
        try:
            arrived = torch.zeros(frames * triton_vae.shares(channels), dtype=torch.int32, device=DEVICE)
            return normalise(x, weight, shift, arrived, bias=bias, tuning=tuning)
        finally:
            triton_vae.SHARE = before

    return {
        "copy": lambda: x.clone(),
        **{f"norm, {name}": lambda cut=cut: norm(*cut) for name, cut in CUTS.items()},
        "convolution by torch": lambda: nhwc(F.conv2d(nchw(x), window, None, padding=1)),
        "convolution, bias and residual by torch": lambda: nhwc(
            F.conv2d(nchw(x), window, bias, padding=1) + nchw(rest)
        ),
        "convolution with both by cuDNN": lambda: nhwc(convolve(nchw(x), window, bias, nchw(rest))),
        "halving convolution by torch": lambda: nhwc(F.conv2d(nchw(x), window, None, 2, 1)),
        "halving convolution with bias by cuDNN": lambda: nhwc(convolve(nchw(x), window, bias, stride=2)),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=least(1), default=32 if CUDA else 2, help="at once")
    parser.add_argument("--plays", type=least(0), default=0, help="of every piece, compared to the bit")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True  # as in training
    print(torch.cuda.get_device_name() if CUDA else "no GPU: Triton's interpreter, times mean nothing")
    print(f"{'pixels':>6} {'channels':>8}  {'piece':<42} {'ms':>8} {'GB/s':>6} {'TFLOP/s':>8} {'other':>6}")
    lines: list[str] = []
    wanted = 0
    for size, channels in SHAPES:
        for name, work in pieces(args.frames, size, channels).items():
            wanted += 1
            replay.tried(lines, (size, name), functools.partial(line, args, size, channels, name, work))
    return int(len(lines) != wanted)


def line(args: argparse.Namespace, size: int, channels: int, name: str, work: Callable[[], Tensor]) -> str:
    count = args.frames * size**2 * channels
    with torch.no_grad():
        ms = 1e3 * replay.seconds(work, 8)
        other = others(work, args.plays)
    place = "halving" in name
    conv = f"{18 * count * channels / (4 if place else 1) / ms / 1e9:>8.0f}" if "conv" in name else f"{'':>8}"
    moved = "" if "conv" in name else f"{4 * count / ms / 1e6:.0f}"
    return f"{size:>6} {channels:>8}  {name:<42} {ms:>8.4f} {moved:>6} {conv} {other:>6}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
