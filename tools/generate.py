"""Generate with a trained model, as the paper's Figure 5: masked clips, or a roll-out from a seed image.

    python tools/generate.py DIR [--mode masked] [--data PATH] [--samples 3] [--mask 1]
    python tools/generate.py DIR --mode autoregressive [--data PATH] [--length 8]
        [--clips 2] [--skip 0] [--solver midpoint|euler] [--steps 20] [--seed 0] [--out FOLDER] [--mp4]

DIR is a folder of `tools/convert_to_torch.py RUN --out DIR --all`, or the run itself with its export in
RUN/encoder. PATH: a manifest, a list, a folder, a video, an image or moving_digits; default: the run's
held-out clips, or what an export says it was trained on.

masked          every frame is predicted from the visible tokens of the true frames before it, as in
                training (Eq. 3); several samples of the same clip differ by their noise.
autoregressive  an image (as --start static token frames) or a video's first --start token frames; the next
                frame is generated, decoded by the target, and read again.

FOLDER (default RUN/plots, or plots beside DIR) gets generated.png and .gif, or rollout.png and .gif; with
--mp4 an MP4 as well (PyAV). On the CPU, with plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from nextvid_mcore import hub  # noqa: E402
from nextvid_mcore.config import ConfigError, RunConfig, require  # noqa: E402
from nextvid_mcore.data.decode import BadFile  # noqa: E402
from nextvid_mcore.data.digits_source import is_digits  # noqa: E402
from nextvid_mcore.data.loader import build_dataset  # noqa: E402
from nextvid_mcore.data.transforms import normalize  # noqa: E402
from nextvid_mcore.evaluation import clips as clip_files  # noqa: E402
from nextvid_mcore.evaluation import strips  # noqa: E402
from nextvid_mcore.evaluation.clips import Clip  # noqa: E402
from nextvid_mcore.evaluation.generation import (  # noqa: E402
    SOLVERS,
    Networks,
    draw_noise,
    roll_out,
    run_config_of,
)
from nextvid_mcore.evaluation.pictures import HIDDEN, visible_map  # noqa: E402
from nextvid_mcore.evaluation.results import writable_folder  # noqa: E402
from nextvid_mcore.evaluation.strips import Panel, Strip  # noqa: E402
from nextvid_mcore.hub.export import check_generator, flat_config, read_run  # noqa: E402
from nextvid_mcore.masking import draw_masks  # noqa: E402
from nextvid_mcore.targets import Target, build_target  # noqa: E402

# Keys of an export's config.json that may differ from its run's settings: the rest shapes the pictures.
ITS_OWN = ("version", "recipe", "step", "weights", "frames", "clips")


def settings(args: argparse.Namespace) -> tuple[RunConfig, Path, Path]:
    """The configuration, the folder of the networks, and that of the pictures."""
    path = args.folder / "config.json"
    try:
        is_run = "stages" in json.loads(path.read_text())
    except (OSError, ValueError):
        is_run = False
    if is_run:
        config, export = read_run(args.folder), args.export or args.folder / "encoder"
        require(
            config.model.generate,
            f"{args.folder} was trained without a decoder; there is nothing to generate",
        )
        check_generator(config.model)  # before an export that could not be made is asked for
        require(
            export.exists(),
            f"{export} does not exist; export the run first: python tools/convert_to_torch.py "
            f"{quote(str(args.folder))} --out {quote(str(export))} --all",
        )
        made = hub.load_config(export)
        wanted = flat_config(config, made["target_channels"], made["step"], made["weights"])
        other = [name for name in made if name not in ITS_OWN and made[name] != wanted[name]]
        require(
            not other,
            f"{export} is of another run than {args.folder}: "
            + ", ".join(f"{name} {made[name]} and not {wanted[name]}" for name in other)
            + f"; export this one with --all, or draw the other by its name: generate.py {export}",
        )
        out = args.out or args.folder / "plots"
    else:
        exported, export = hub.load_config(args.folder), args.folder
        config = run_config_of(exported, args.fps or 4.0)
        out = args.out or args.folder.absolute().parent / "plots"
    given = {
        name: value
        for name, value in (("checkpoint", args.target_checkpoint), ("statistics", args.target_statistics))
        if value is not None
    }
    kind = config.target.kind
    flags = ", ".join(f"--target-{name}" for name in given)
    require(
        not given or kind != "pixels", f"{flags}: this model makes pixels and needs no files; leave it out"
    )
    config = config.altered(target=given)
    require(
        kind == "pixels" or config.target.checkpoint is not None,
        f"this model generates latents of {kind}: give what it was trained with, --target-checkpoint"
        + (" and --target-statistics" if kind == "va_vae" else ""),
    )
    if args.fps:
        config = config.altered(data={"fps": args.fps})
    return config, export, out


def read_clips(config: RunConfig, args: argparse.Namespace, frames: int) -> list[Clip]:
    """The clips number `skip` .. `skip + clips`."""
    size = config.model.image_size
    source = args.data or config.data.eval_manifest or ""
    if is_digits(source):
        return clip_files.moving_digits(
            args.clips, frames, size, args.skip, source, config.data.manifest or ""
        )
    if args.data is None:
        require(
            config.data.eval_manifest is not None,
            "there is no run that would name clips: give --data, a manifest, a folder, a video or an image",
        )
        data, out = build_dataset(config, train=False), []
        there = sum(data.mixture.rows)
        for index in range(args.skip, args.skip + enough(source, there - args.skip, args)):
            sample = data.sample(index, frames)
            video, name = normalize(sample.video), Path(sample.item).name
            out.append(Clip(video, sample.label, name, sample.static))
        return out
    found = clip_files.find(args.data, args.skip + args.clips).items[args.skip :]
    enough(args.data, len(found), args)
    return [clip_files.read(item, frames, size, config.data.fps) for item in found]


def enough(source: str, left: int, args: argparse.Namespace) -> int:
    """How many clips to draw of the `left` that `source` has behind --skip; says so where they are few."""
    require(left > 0, f"{source} has no more than {args.skip} clips; lower --skip")
    if left < args.clips and not Path(source).is_file():
        print(f"{source} has {left} clips from --skip {args.skip} on, not the {args.clips} of --clips")
    return min(left, args.clips)


def masked(
    config: RunConfig, networks: Networks, target: Target, clips: list[Clip], args: argparse.Namespace
) -> list[Strip]:
    """Original, visible patches and samples of every clip."""
    model, out = config.model, []
    t = model.token_frames(clips[0].video.shape[1])
    masks_of = config.mask.masks
    require(1 <= args.mask <= masks_of, f"--mask {args.mask}: the run has masks 1 to {masks_of}")
    for number, clip in enumerate(clips):
        index, video = args.skip + number, clip.video[None]
        masks = draw_masks(config.mask, model.grid, t - 1, args.seed, [index])
        tokens = next(masks.of(part) for part in masks.segments if part.mask == args.mask - 1)
        seen = visible_map(masks, args.mask - 1, t)  # [1, t, n]
        truth = target.latents(video, indices=[index])
        panels = [
            Panel("original", clip.video),
            Panel("visible", hidden(clip.video, seen[0], model.tubelet_size), "not read"),
        ]
        rebuilt = target.decode(truth)[0].cpu()
        if not torch.allclose(rebuilt, clip.video, atol=1 / 255):
            panels.append(Panel("through\nthe target", rebuilt))
        for sample in range(args.samples):
            noise = draw_noise(args.seed, index, sample, (t - 1, *truth.shape[2:]))
            latents = networks.generate(video, tokens, noise, args.steps, SOLVERS[args.solver])
            frames = target.decode(latents)[0].cpu().clamp(-1, 1)
            nothing = torch.full_like(clip.video[:, : model.tubelet_size], torch.nan)
            panels.append(Panel(f"sample {sample + 1}", torch.cat([nothing, frames], dim=1)))
        share = seen[0, 0].float().mean().item()
        out.append(Strip(f"{clip.name}  ({share:.0%} of each frame visible)", panels))
    return out


def hidden(video: Tensor, seen: Tensor, tubelet: int) -> Tensor:
    """video [3, T, H, W] with the tokens that aren't in seen, bool [t, n], dark blue; the last frame nan."""
    t, n = seen.shape
    side = round(n**0.5)
    patch = video.shape[-1] // side
    plane = seen.reshape(t, side, side).repeat_interleave(tubelet, 0)
    plane = plane.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    out = torch.where(plane, video, HIDDEN)
    out[:, -tubelet:] = torch.nan  # the last frame is never read
    return out


def autoregressive(
    config: RunConfig, networks: Networks, target: Target, clips: list[Clip], args: argparse.Namespace
) -> list[Strip]:
    """Roll-outs from every clip's start; of a video also what really came."""
    model, out = config.model, []
    for number, clip in enumerate(clips):
        index, tubelet = args.skip + number, model.tubelet_size
        start = clip.video[None, :, : args.start * tubelet]
        shape = (args.length, model.tokens_per_frame, target.channels)
        panels = [] if clip.image else [Panel("original", clip.video)]
        for sample in range(args.samples):
            noise = draw_noise(args.seed, index, sample, shape)
            video = roll_out(
                networks, target, start, args.length, noise, args.steps, SOLVERS[args.solver], args.keep
            )
            panels.append(Panel(f"sample {sample + 1}", video[0].cpu()))
        what = "a seed image" if clip.image else f"the first {start.shape[2]} frames of a video"
        out.append(Strip(f"{clip.name}  (from {what})", panels))
    return out


def draw(args: argparse.Namespace) -> list[Path]:
    """Generate, and write the pictures."""
    for name in ("clips", "samples", "steps", "length", "start", "columns"):
        require(getattr(args, name) >= 1, f"--{name} must be 1 or more, got {getattr(args, name)}")
    require(args.skip >= 0, f"--skip must be 0 or more, got {args.skip}")
    require(args.keep is None or args.keep >= 1, f"--keep must be 1 or more, got {args.keep}")
    require(args.frames is None or args.frames >= 1, f"--frames must be 1 or more, got {args.frames}")
    require(args.fps is None or 0 < args.fps < float("inf"), f"--fps must be positive, got {args.fps}")
    if args.mp4:
        strips.check_mp4()
    config, export, out = settings(args)
    writable_folder(out)
    networks, target = Networks.load(export), build_target(config, "cpu", torch.float32)
    require(
        target.channels == networks.decoder.channels,
        f"the decoder generates {networks.decoder.channels} channels and the target has {target.channels}: "
        "give the target of its training with --target-checkpoint",
    )
    tubelet, fps = config.model.tubelet_size, config.data.fps
    if args.mode == "masked":
        frames = args.frames or config.stages[0].frames
        rows = masked(config, networks, target, read_clips(config, args, frames), args)
        name, title, step = "generated", "Next frames generated from what was visible before", tubelet
    else:
        frames = (args.start + args.length) * tubelet
        rows = autoregressive(config, networks, target, read_clips(config, args, frames), args)
        name, step = "rollout", tubelet
        title = f"Roll-out: from frame {args.start * tubelet} on, each frame is generated from those before"
    paths = [out / f"{name}.png", out / f"{name}.gif"]
    strips.write_png(rows, paths[0], title, step=step, columns=args.columns)
    frames = strips.film(rows)
    strips.write_gif(frames, paths[1], fps)
    if args.mp4:
        paths.append(out / f"{name}.mp4")
        strips.write_mp4(frames, paths[2], fps)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="an export with --all, or a run")
    parser.add_argument("--mode", choices=("masked", "autoregressive"), default="masked")
    parser.add_argument("--export", type=Path, help="of a run: folder of the networks (default RUN/encoder)")
    parser.add_argument("--out", type=Path, help="folder of the pictures")
    parser.add_argument("--data", help="clips: a manifest, a list, a folder, a video or an image")
    parser.add_argument("--clips", type=int, default=2, help="how many clips")
    parser.add_argument("--skip", type=int, default=0, help="clips to pass over first")
    parser.add_argument("--frames", type=int, help="masked: of a clip (default: the first stage's)")
    parser.add_argument("--mask", type=int, default=1, help="masked: number of the mask, from 1")
    parser.add_argument("--length", type=int, default=7, help="autoregressive: token frames to generate")
    parser.add_argument("--start", type=int, default=1, help="autoregressive: token frames given")
    parser.add_argument("--keep", type=int, help="autoregressive: token frames read at most (default: all)")
    parser.add_argument("--samples", type=int, default=2, help="of every clip")
    parser.add_argument("--solver", choices=tuple(SOLVERS), default="midpoint")
    parser.add_argument("--steps", type=int, default=20, help="of the solver")
    parser.add_argument("--seed", type=int, default=0, help="of noise and masks")
    parser.add_argument("--fps", type=float, help="frames a second (default: the run's, or 4)")
    parser.add_argument("--columns", type=int, default=8, help="frames drawn in the PNG, at most")
    parser.add_argument("--target-checkpoint", help="of a target that is a network (va_vae, cosmos, siglip2)")
    parser.add_argument("--target-statistics", help="its statistics file")
    parser.add_argument("--mp4", action="store_true", help="an MP4 too; needs PyAV")
    args = parser.parse_args()
    try:
        paths = draw(args)
    except (ConfigError, hub.HubError, BadFile, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
