"""NVDEC through DALI against decord: the same frames, samples and bad files.

decord is compared where it is right: of HEVC with open groups of pictures, as `hevc.mp4` is, it is a frame
or two late once it has jumped to a key frame (decode.py), so there the whole file is read.
Pixels differ in how YUV becomes RGB and in where scaling rounds. Tolerance: a mean absolute difference of 4
of 255 over a clip; a mirrored clip of these is further away by tens.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_clips import CLIPS, number

from nextvid_mcore import recipes
from nextvid_mcore.config import RunConfig
from nextvid_mcore.data.decode import Video
from nextvid_mcore.data.loader import ClipBatch, build_dataset, iterate
from nextvid_mcore.data.manifest import Item, SetWriter
from nextvid_mcore.data.nvdec import LANES, Job, Nvdec, Refused

TOLERANCE = 4.0
REQUESTS = [(8, tuple(range(LANES + 5))), (16, (20, 21, 22))]


@pytest.fixture(autouse=True)
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia-dali belongs to the extra gpu")


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float().cpu() - b.float().cpu()).abs().mean())


def configure(folder: Path, names: list[str], decoder: str) -> RunConfig:
    """tiny on a manifest of these files of CLIPS, or of `folder`."""
    paths = [folder / name if (folder / name).exists() else CLIPS / name for name in names]
    with SetWriter(folder / decoder, "s") as writer:
        writer.add([Item(str(path), "video", i) for i, path in enumerate(paths)])
    config = recipes.get("tiny")
    data = dataclasses.replace(config.data, manifest=str(folder / decoder), decoder=decoder, sets=())
    return dataclasses.replace(config, data=data)


def both(folder: Path, names: list[str], workers: int = 0) -> tuple[list[ClipBatch], list[ClipBatch]]:
    """All of REQUESTS by decord and by dali."""
    found = []
    for decoder in ("decord", "dali"):
        dataset = build_dataset(configure(folder, names, decoder))
        found.append(list(iterate(dataset, REQUESTS, workers=workers if decoder == "dali" else 0)))
    return found[0], found[1]


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4"])
def test_exactly_the_frames_asked_for(name: str) -> None:
    path, reader = str(CLIPS / name), Nvdec(0)
    whole = Video(path).read(np.arange(40))
    assert number(whole) == list(range(40))
    wanted = [np.array(frames) for frames in ([0], [39], [3, 10, 17, 24], [11, 12, 13, 35], np.arange(40))]
    for frames, clip in zip(wanted, reader.read([Job(path, frames) for frames in wanted]), strict=True):
        assert not isinstance(clip, Refused), clip.reason
        exact = torch.from_numpy(whole[frames])
        assert clip.is_cuda and clip.shape == exact.shape and clip.dtype == torch.uint8
        assert number(clip.cpu().numpy()) == frames.tolist()
        differences = [mean_difference(a, b) for a, b in zip(clip, exact, strict=True)]
        print(f"{name}: mean absolute difference from decord {np.mean(differences):.2f} of 255")
        assert max(differences) < TOLERANCE


def compare(decord: list[ClipBatch], dali: list[ClipBatch]) -> None:
    for a, b in zip(decord, dali, strict=True):
        assert a.items == b.items and torch.equal(a.index, b.index) and torch.equal(a.static, b.static)
        assert [path for path, _ in a.bad] == [path for path, _ in b.bad] and a.bad_samples == b.bad_samples
        for one, other in zip(a.video, b.video, strict=True):
            assert mean_difference(one, other) < TOLERANCE
            assert mean_difference(one, other.flip(-1)) > 2 * TOLERANCE, "a flip would be seen"
            assert mean_difference(one[:, :-1], other[:, 1:]) > mean_difference(one, other), "so would time"


def test_samples_are_decords_in_a_worker_process_too(tmp_path: Path) -> None:
    shutil.copy(CLIPS / "h264.mp4", tmp_path / "again.mp4")  # not HEVC: decord's windows may be late there
    decord, dali = both(tmp_path, ["h264.mp4", "again.mp4"], workers=1)
    compare(decord, dali)
    assert not any(batch.refused or batch.bad for batch in dali)


def test_what_nvdec_lacks_is_read_by_decord_and_bad_files_are_bad(tmp_path: Path) -> None:
    whole = (CLIPS / "h264.mp4").read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    shutil.copy(CLIPS / "h264-444.mp4", tmp_path / "odd.mp4")
    decord, dali = both(tmp_path, ["h264.mp4", "odd.mp4", "torn.mp4", "text.mp4", "gone.mp4"])
    compare(decord, dali)
    bad = {Path(path).name for batch in dali for path, _ in batch.bad}
    assert bad == {"torn.mp4", "text.mp4", "gone.mp4"}
    refused = [Path(path).name for batch in dali for path, _ in batch.refused]
    print("refused:", next((reason for batch in dali for _, reason in batch.refused), "nothing"))
    draw = build_dataset(
        configure(tmp_path / "again", ["h264.mp4", "odd.mp4", "t", "u", "v"], "decord")
    )._draw
    first = [draw(index, 0)[1].label for _, indices in REQUESTS for index in indices]
    assert refused == ["odd.mp4"] * first.count(1) and refused
