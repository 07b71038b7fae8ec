"""Write a manifest from folders and lists of files.

    python tools/build_manifest.py --out data/manifest \\
        --set imagenet=/data/imagenet/train:image --set k400=/data/k400_train.csv --probe --holdout 0.01

A set's path is a folder (its first-level subfolders give the labels) or a list with "path label" on each
line, as V-JEPA has them. A name given twice joins its sources into one set. --probe opens every file and
decodes its first frame: what can't be read or is too short is left out and listed in OUT/rejected.tsv.
The same command run again keeps what was probed (under OUT/.probed) and looks again at what was bad.
Sets that OUT already holds and this call doesn't name stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

from nextvid_mcore.config import ConfigError  # noqa: E402
from nextvid_mcore.data.build import Build, Report  # noqa: E402
from nextvid_mcore.data.manifest import Manifest  # noqa: E402
from nextvid_mcore.data.sources import Source  # noqa: E402


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the manifest")
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        required=True,
        metavar="NAME=PATH[:KIND]",
        help="a set; KIND is video or image, by the files' extensions if left out",
    )
    parser.add_argument("--probe", action="store_true", help="open every file (frames, fps, is it readable)")
    parser.add_argument(
        "--min-frames", type=int, default=2, help="with --probe: leave shorter videos out (default 2)"
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put this share of every set's files into a second manifest; which ones depends on the path",
    )
    parser.add_argument("--holdout-out", type=Path, help="its folder (default: OUT-val)")
    parser.add_argument("--relative", action="store_true", help="store paths relative to the manifest")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that probe")
    return parser


def say(report: Report, build: Build) -> str:
    parts = [f"{count:,} {kind}s" for kind, count in sorted(report.kinds.items())]
    if report.held_out:
        parts.append(f"{report.held_out:,} of them held out")
    if report.seconds:
        parts.append(f"{report.seconds / 3600:,.2f} hours of video")
    words = {
        "unreadable": "unreadable",
        "short": f"shorter than {build.min_frames} frames",
        "unknown": "of unknown kind",
    }
    parts += [f"{count:,} {words[what]}" for what, count in sorted(report.rejected.items())]
    return f"{report.name}: {', '.join(parts)}"


def main() -> int:
    args = arguments().parse_args()
    bar = tqdm(unit=" files", disable=None)
    current = ""

    def progress(name: str, done: int, total: int) -> None:
        nonlocal current
        if name != current:
            bar.reset(total)
            bar.set_description(name)
            current = name
        bar.update(done - bar.n)

    try:
        build = Build(
            out=args.out.absolute(),
            probe=args.probe,
            min_frames=args.min_frames,
            holdout=args.holdout,
            holdout_out=args.holdout_out and args.holdout_out.absolute(),
            relative=args.relative,
            jobs=args.jobs,
        )
        reports = build.run([Source.parse(text) for text in args.sets], progress)
        bar.close()
        for report in reports:
            print(say(report, build))
        if any(report.rejected for report in reports):
            print(f"what was left out, and why: {build.out / 'rejected.tsv'}")
        for folder in [build.out, build.held] if build.holdout else [build.out]:
            manifest = Manifest.open(folder)
            print(f"{folder}: {manifest.rows:,} rows in {', '.join(manifest.sets)}")
        if stale := build.stale(report.name for report in reports):
            print(
                f"note: {build.held} holds files of {', '.join(stale)} from an earlier call, which are in "
                f"{build.out} too now: no held-out clips any more; build again with --holdout, or remove it"
            )
    except (ConfigError, OSError) as error:  # a full disk too
        bar.close()
        print(f"build_manifest: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
