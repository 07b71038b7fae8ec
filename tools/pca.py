"""What the encoder sees, over time: the three principal components of its features as red, green and blue.

    python tools/pca.py DIR --data PATH [--clips 3] [--layers 11,-1] [--frames T] [--out FOLDER] [--mp4]

DIR is a folder of tools/convert_to_torch.py; PATH a manifest, a list, a folder, a video, an image or
moving_digits. The components are those of all tokens of all clips drawn, one basis a layer, so colours can be
compared over time and between clips: equal colours are like features. The encoder is causal: a frame's
colours never depend on what comes after it. FOLDER (default plots beside DIR) gets features.png and
features.gif.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from nextvid_mcore import hub  # noqa: E402
from nextvid_mcore.config import ConfigError, require  # noqa: E402
from nextvid_mcore.data.digits_source import is_digits  # noqa: E402
from nextvid_mcore.evaluation import clips, strips  # noqa: E402
from nextvid_mcore.evaluation.results import writable_folder  # noqa: E402
from nextvid_mcore.evaluation.strips import Panel, Strip  # noqa: E402

SPREAD = 0.02  # share of the values cut at either end of a colour's range


def colours(features: Tensor) -> Tensor:
    """Features [B, s, D] -> colours [B, s, 3] in [-1, 1], of one basis."""
    flat = features.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)  # rising
    basis = vectors[:, -3:].flip(1)
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # a vector's sign is arbitrary
    parts = flat @ (basis * signs)  # [B * s, 3]
    low, high = (parts.sort(0).values[int(q * (len(parts) - 1))] for q in (SPREAD, 1 - SPREAD))
    scaled = 2 * (parts - low) / (high - low).clamp_min(1e-12) - 1
    return scaled.clamp(-1, 1).float().unflatten(0, features.shape[:2])


def to_video(tokens: Tensor, encoder: hub.VisionTransformer, shape: torch.Size) -> Tensor:
    """Colours [t*n, 3] of one clip as a video of its shape [3, T, H, W], a square a token."""
    t, h, w = encoder.grid((1, *shape))
    video = tokens.reshape(t, h, w, 3).permute(3, 0, 1, 2)
    for dim, size in ((1, encoder.tubelet_size), (2, encoder.patch_size), (3, encoder.patch_size)):
        video = video.repeat_interleave(size, dim)
    return video


def draw(args: argparse.Namespace) -> list[Path]:
    """Extract and draw; the files written."""
    require(args.clips >= 1, f"--clips must be 1 or more, got {args.clips}")
    if args.mp4:
        strips.check_mp4()
    config, encoder = hub.load_config(args.folder), hub.load_encoder(args.folder)
    args.layers = args.layers or sorted({(encoder.depth - 1) // 2, encoder.depth - 1})
    wrong = [layer for layer in args.layers if not -encoder.depth <= layer < encoder.depth]
    require(
        not wrong, f"--layers {wrong}: the encoder has layers 0 to {encoder.depth - 1}, or -1 from the end"
    )
    frames = config["frames"] if args.frames is None else args.frames
    clips.check_shape(encoder, frames, config["image_size"], args.fps)
    out = writable_folder(args.out or args.folder.absolute().parent / "plots")
    if is_digits(args.data):
        taken = clips.moving_digits(
            args.clips, frames, config["image_size"], source=args.data, trained_on=config["clips"]
        )
    else:
        found = clips.find(args.data, None if args.kind else 4 * args.clips, args.kind)
        every = clips.read_all(found, frames, config["image_size"], args.fps)
        taken = list(itertools.islice(every, args.clips))
    require(len(taken) > 0, f"{args.data}: no clip could be decoded")
    with torch.no_grad():
        per_clip = [encoder(clip.video[None], return_layers=args.layers) for clip in taken]
    layers = [colours(torch.cat(parts)) for parts in zip(*per_clip, strict=True)]  # each [B, t*n, 3]
    rows = []
    for number, clip in enumerate(taken):
        panels = [Panel("video", clip.video)]
        for layer, part in zip(args.layers, layers, strict=True):
            name = f"after block\n{layer % encoder.depth + 1} of {encoder.depth}"
            panels.append(Panel(name, to_video(part[number], encoder, clip.video.shape)))
        rows.append(Strip(clip.name, panels))
    paths = [out / "features.png", out / "features.gif"]
    title = f"Principal components of the features, {config['recipe']} step {config['step']}"
    strips.write_png(rows, paths[0], title, step=encoder.tubelet_size)
    film = strips.film(rows)
    strips.write_gif(film, paths[1], args.fps)
    if args.mp4:
        paths.append(out / "features.mp4")
        strips.write_mp4(film, paths[2], args.fps)
    return paths


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of tools/convert_to_torch.py")
    parser.add_argument(
        "--data", required=True, help="a manifest, list, folder, video, image or moving_digits"
    )
    parser.add_argument("--kind", choices=("video", "image"), help="only videos or only images")
    parser.add_argument("--clips", type=int, default=3, help="how many")
    parser.add_argument(
        "--layers", type=numbers, help="blocks, from 0; -1 is the last (default: the middle, the last)"
    )
    parser.add_argument("--frames", type=int, help="of a clip (default: the pretraining's)")
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second")
    parser.add_argument("--out", type=Path, help="folder of the pictures")
    parser.add_argument("--mp4", action="store_true", help="an MP4 too; needs PyAV")
    args = parser.parse_args()
    try:
        paths = draw(args)
    except (ConfigError, hub.HubError, OSError) as error:
        print(f"pca: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
