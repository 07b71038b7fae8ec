"""Probe a frozen encoder: train a small classifier on its features, or look at its nearest neighbours.

    python tools/probe.py exports/vit_l --dataset ssv2 --train train.csv --val val.csv --out probes/ssv2
    python tools/probe.py exports/tiny --dataset moving_digits --out probes/digits
    torchrun --nproc-per-node 8 tools/probe.py exports/vit_g --dataset k400 --train ... --val ... --out ...

ENCODER is a folder of tools/convert_to_torch.py, a V-JEPA 2 checkpoint or imported folder, random:RECIPE,
pixels:SIDE, timm:NAME or transformers:NAME (see nextvid_mcore/evaluation/encoders.py). The data sets k400,
in1k, ssv2 and diving48 are Tables 9 and 10 of the paper; any number can be changed by its flag; `custom` is
for lists of your own. Lists have "path label" on each line; a folder with a subfolder a class works too.

The sweep of learning rates and weight decays is judged on a part of the training set; the validation set
is scored once, by the chosen probe. Stopped (Ctrl-C, SIGTERM, --stop-after), the same command goes on. The
exit status is 0 with a result, 2 for a wrong setting and 3 when stopped before the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import torch  # noqa: E402

from nextvid_mcore.config import MOVING_DIGITS, ConfigError, require  # noqa: E402
from nextvid_mcore.data.digits_source import side_of  # noqa: E402
from nextvid_mcore.evaluation import ranks as ranks_  # noqa: E402
from nextvid_mcore.evaluation.datasets import build_data, lists_notes  # noqa: E402
from nextvid_mcore.evaluation.encoders import Encoder, HubEncoder, build_encoder  # noqa: E402
from nextvid_mcore.evaluation.presets import METHODS, PRESETS, ProbeConfig, preset  # noqa: E402
from nextvid_mcore.evaluation.run import RESULTS, Job, run  # noqa: E402

NUMBERS = {
    "classes": "default: the largest training label + 1",
    "train_items": "of moving digits",
    "val_items": "of moving digits",
    "segments": "clips of a video, their tokens in a row",
    "views": "crops of a validation clip, averaged",
    "frames": "of a clip",
    "size": "pixels of a frame (default: what the encoder was trained on)",
    "side": "pixels of a moving digit",
    "augment": "differently cropped copies of the training set; 0: none (default: one an epoch)",
    "batch": "items of a step, over all ranks",
    "epochs": "of the training set",
    "layers": "encoder layers, their tokens in a row",
    "heads": "of the probe's attention",
    "k": "neighbours of --method knn",
    "seed": "of split, order, crops and weights",
}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    out.add_argument("encoder", metavar="ENCODER", help="a folder, a checkpoint, or KIND:NAME")
    out.add_argument("--dataset", required=True, choices=[*PRESETS, "custom"])
    out.add_argument("--method", choices=METHODS, default="attentive")
    out.add_argument("--train", metavar="LIST", help="training list or folder")
    out.add_argument("--val", metavar="LIST", help="validation list or folder")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"gets {RESULTS} and the state")
    changes = out.add_argument_group("instead of the preset's numbers")
    for name, what in NUMBERS.items():
        changes.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=what)
    changes.add_argument("--rate", type=float, metavar="X", help="frame step, or frames a second")
    changes.add_argument("--rate-is", choices=("step", "fps"), help="how to read --rate (presets: step)")
    changes.add_argument("--flip", type=float, metavar="P", help="share of mirrored training clips")
    changes.add_argument("--holdout", type=float, metavar="SHARE", help="of the training set, for the choice")
    changes.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="of the sweep")
    changes.add_argument("--weight-decays", type=float, nargs="+", metavar="WD", help="of the sweep")
    changes.add_argument("--mlp", action="store_true", default=None, help="V-JEPA 2's MLP in the probe")
    job = out.add_argument_group("how it runs")
    job.add_argument("--cache", type=Path, metavar="DIR", help="keep features there (without augmentation)")
    job.add_argument("--device", help="cuda, cuda:1 or cpu (default: a GPU if there is one)")
    job.add_argument("--precision", choices=("fp32", "bf16"), help="of the encoder (default: bf16 on a GPU)")
    job.add_argument("--encode-batch", type=int, default=32, metavar="CLIPS", help="in one forward pass")
    job.add_argument(
        "--chunk", type=int, default=32, metavar="ITEMS", help="whose features are held at a time"
    )
    job.add_argument("--workers", type=int, default=4, metavar="N", help="loader processes of a rank")
    job.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="(default: 200)")
    job.add_argument("--stop-after", type=int, metavar="STEPS", help="then stop; the same command goes on")
    job.add_argument("--no-progress", action="store_true")
    return out


FEW = 50  # held-out items

UNREAD = {  # changes that a method, or a kind of data, would pass over without a word
    "knn": (
        "augment",
        "batch",
        "epochs",
        "heads",
        "flip",
        "holdout",
        "lrs",
        "weight_decays",
        "mlp",
        "stop_after",
    ),
    "linear": ("heads", "mlp", "k"),
    "attentive": ("k",),
    "moving_digits": ("classes", "rate", "rate_is", "flip", "segments", "views"),
    "a list": ("train_items", "val_items"),
}


def unread(args: argparse.Namespace) -> list[str]:
    """What is to be said about settings that change nothing."""
    notes = []
    for what in (args.method, "moving_digits" if args.dataset == "moving_digits" else "a list"):
        given = [f"--{name.replace('_', '-')}" for name in UNREAD[what] if getattr(args, name) is not None]
        if given:
            notes.append(f"{', '.join(given)}: not read with {what}, so nothing changes")
    return notes


def config_of(args: argparse.Namespace, encoder: Encoder) -> tuple[ProbeConfig, list[str]]:
    """The preset with this command's changes, and what is to be said about it."""
    changes: dict[str, Any] = {"method": args.method}
    for name in (*NUMBERS, "rate", "rate_is", "flip", "holdout", "mlp"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    for name in ("lrs", "weight_decays"):
        if getattr(args, name) is not None:
            changes[name] = tuple(getattr(args, name))
    notes = unread(args)
    config = preset(args.dataset, **changes)
    fits = isinstance(encoder, HubEncoder) or args.dataset != "moving_digits"  # others resize small frames
    if args.size is None and encoder.image_size not in (None, config.size) and fits:
        notes.append(f"frames of {encoder.image_size} pixels, the encoder's, instead of {config.size}")
        config = dataclasses.replace(config, size=encoder.image_size)
    made, same = getattr(encoder, "clips", ""), encoder.image_size == config.size
    side = side_of(MOVING_DIGITS, config.size, made) if made and same else None
    if config.dataset == "moving_digits" and args.side is None and side is not None:
        notes.append(f"digits of {side} pixels, the pretraining's")
        config = dataclasses.replace(config, side=side)
    if args.cache is not None and config.augment is None and config.method != "knn":
        notes.append("no augmentation, because features are cached; --augment N caches N cropped copies")
        config = dataclasses.replace(config, augment=0)
    return config, notes


def headline(config: ProbeConfig, train: int, val: int) -> str:
    """What is about to run."""
    text = f"{config.dataset}, {config.method}: {train:,} training and {val:,} validation items, "
    text += f"{config.frames} frames of {config.size} pixels"
    if config.dataset != "moving_digits":
        text += f", {'step' if config.rate_is == 'step' else 'frames a second'} {config.rate:g}"
    text += f", {config.segments} segment(s), {config.views} view(s), {config.layers} encoder layer(s)"
    if config.method == "knn":
        fewer = f"{train:,} neighbours, as there are no {config.k:,}" if train < config.k else ""
        return f"{text}; {fewer or f'{config.k:,} neighbours'}"
    members = len(config.lrs) * len(config.weight_decays)
    return f"{text}; {members} probes, batch {config.batch}, {config.epochs} epochs"


def sizes_note(config: ProbeConfig, train: int, val: int) -> list[str]:
    """Lists that differ much from Table 9's, and few items to choose by, are worth a word."""
    notes, held = [], max(1, round(train * config.holdout))
    if config.method != "knn" and len(config.lrs) * len(config.weight_decays) > 1 and held < FEW:
        notes.append(f"only {held} held-out training item(s) judge the sweep; --holdout 0.2 holds out more")
    for what, found, wanted in (
        ("training", train, config.train_items),
        ("validation", val, config.val_items),
    ):
        if config.dataset != "moving_digits" and wanted and abs(found - wanted) > 0.05 * wanted:
            notes.append(f"{found:,} {what} items; Table 9 has about {wanted:,}")
    return notes


def describe(results: dict[str, Any]) -> list[str]:
    """The results in a few lines."""
    lines = []
    for task, r in results["tasks"].items():
        low, high = r["ci95"]
        line = (
            f"{task}: top-1 {r['top1']:.2f}% (95%: {low:.2f} to {high:.2f}), {r['correct']} of {r['items']}"
        )
        line += f", chance {r['chance']:.1f}%"
        if "lr" in r:
            line += f"; lr {r['lr']:g}, weight decay {r['weight_decay']:g}"
        if r["unreadable"]:
            line += f"; {r['unreadable']} could not be read and count as wrong"
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    torch.set_float32_matmul_precision("high")
    here = None
    try:
        for name in ("encode_batch", "chunk", "save_every"):
            require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be 1 or more")
        require(args.workers >= 0, f"--workers must be 0 or more, got {args.workers}")
        require(args.stop_after is None or args.stop_after >= 1, "--stop-after must be 1 or more")
        encoder = build_encoder(args.encoder, args.seed or 0)
        config, notes = config_of(args, encoder)
        here = ranks_.start(args.device)
        train, val = build_data(config, args.train, args.val, here.device, encoder.per_frame)
        if here.first:
            print(headline(config, len(train), len(val)))
            for note in [*notes, *lists_notes(train, val), *sizes_note(config, len(train), len(val))]:
                print(note, flush=True)
        job = Job(
            out=args.out,
            cache=args.cache,
            encode_batch=args.encode_batch,
            chunk=args.chunk,
            workers=0 if config.dataset == "moving_digits" else args.workers,
            half=(args.precision or ("bf16" if here.device.type == "cuda" else "fp32")) == "bf16",
            save_every=args.save_every,
            stop_after=args.stop_after,
            progress=not args.no_progress,
        )
        before = (args.out / RESULTS).exists()
        results = run(config, encoder, train, val, job, here)
        if here.first and results is not None:
            last = f"{'was finished before:' if before else 'wrote'} {args.out / RESULTS}"
            print("\n".join([*describe(results), last]))
        elif here.first:
            print(f"stopped before the end; the same command goes on from {args.out}")
        return 0 if results is not None else 3
    except (ConfigError, OSError) as error:  # a full disk too
        if here is None or here.first:
            print(f"probe: {error}", file=sys.stderr)
        return 2
    finally:
        ranks_.stop()


if __name__ == "__main__":
    sys.exit(main())
