"""The dali decoder round NVDEC itself: the same samples as decord's, what is refused, what is missing.

Frames come from decord here, in NVDEC's place; tests/gpu/test_nvdec.py has the real ones. DALI's own part
(frame numbers, a file that fails its batch) runs on its CPU decoders where DALI is installed.
"""

from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import media
import numpy as np
import pytest
import torch
from test_data_loader import configure, same

from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.data import decode, nvdec
from nextvid_mcore.data.loader import ClipDataset, build_dataset, iterate
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.data.nvdec import Job, Nvdec, Refused

REQUESTS = [(8, tuple(range(11))), (16, (30, 12, 13)), (4, (17,))]  # 11: more than one run of the decoder


class Decord:
    """Gives what `Nvdec` gives, except of files whose names hold `refuses`."""

    def __init__(self, refuses: str = "none") -> None:
        self.refuses, self.jobs = refuses, []

    def read(self, jobs: Sequence[Job]) -> list[torch.Tensor | Refused]:
        self.jobs += jobs
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> torch.Tensor | Refused:
        assert (np.diff(job.frames) > 0).all()
        if self.refuses in Path(job.path).name:
            return Refused(f"codec {len(self.jobs)} is odd")
        try:
            return torch.from_numpy(decode.Video(job.path).read(job.frames))
        except decode.BadFile as error:
            return Refused(error.reason)


def build(config: RunConfig, decoder: Decord | None = None) -> ClipDataset:
    dataset = build_dataset(config)
    dataset.nvdec = decoder
    return dataset


@pytest.fixture
def items(tmp_path: Path) -> dict[str, list[Item]]:
    """Videos, one torn and one missing, and images. Some are shorter than 16 frames at 4 a second."""
    videos = [media.video(tmp_path / f"v{i}.avi", frames=20 + 4 * i, fps=8.0) for i in range(5)]
    media.truncated(tmp_path / "bad.avi", videos[0], 0.01)
    paths = [*videos, tmp_path / "bad.avi", tmp_path / "gone.avi"]
    images = [media.image(tmp_path / f"i{i}.png", 40 * i) for i in range(2)]
    return {
        # probed before the torn file was torn: so it is tried
        "clips": [Item(str(p), "video", i, *(20, 8.0) * ("bad" in p.name)) for i, p in enumerate(paths)],
        "pictures": [Item(str(path), "image") for path in images],
    }


def test_samples_and_bad_files_are_decords(tmp_path: Path, items: dict[str, list[Item]]) -> None:
    config, decoder = configure(tmp_path, items), Decord()
    wanted = list(iterate(build(config), REQUESTS))
    got = list(iterate(build(config, decoder), REQUESTS))
    assert all(same(a, b) for a, b in zip(wanted, got, strict=True))
    assert any(batch.bad for batch in got) and any(batch.static.any() for batch in got)
    assert not any(batch.refused for batch in got), "what is bad for decord too is bad, and not refused"
    assert len(decoder.jobs) >= 5
    evaluation = [list(iterate(build(config, each), [(8, (0, 1, 2))])) for each in (None, Decord())]
    assert same(*(batches[0] for batches in evaluation))


def test_decord_reads_what_is_refused_and_it_is_counted(
    tmp_path: Path, items: dict[str, list[Item]], caplog: pytest.LogCaptureFixture
) -> None:
    config, decoder = configure(tmp_path, items), Decord(refuses="v3")
    wanted = list(iterate(build(config), REQUESTS))
    with caplog.at_level(logging.WARNING, "nextvid.data"):
        got = list(iterate(build(config, decoder), REQUESTS))
    assert all(same(a, b) for a, b in zip(wanted, got, strict=True))
    asked = sum("v3" in job.path for job in decoder.jobs)
    assert asked > 1 and sum(len(batch.refused) for batch in got) == asked
    said = [text for text in caplog.messages if "NVDEC" in text]
    assert len(said) == 1 and "v3.avi" in said[0] and "refused_samples" in said[0]


def test_a_probed_manifest_spares_decord_the_opening(
    tmp_path: Path, items: dict[str, list[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [item for item in items["clips"] if Path(item.path).name.startswith("v")]
    probed = [item._replace(frames=20 + 4 * i, fps=8.0) for i, item in enumerate(good)]
    plain, fast = (
        configure(tmp_path / name, {"clips": clips}) for name, clips in (("a", good), ("b", probed))
    )
    [wanted] = iterate(build(plain), [(8, tuple(range(12)))])
    decoder = Decord()
    real, opened = decode.Video, []
    monkeypatch.setattr(decode, "Video", lambda path: opened.append(path) or real(path))
    [got] = iterate(build(fast, decoder), [(8, tuple(range(12)))])
    assert same(wanted, got)
    assert len(opened) == len(decoder.jobs) == 12, "only `Decord` itself opens files"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device .* --data.decoder decord"):
        nvdec.check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with pytest.raises(ConfigError, match="needs NVIDIA DALI.*nvidia-dali-cuda130"):
        nvdec.check()


@pytest.mark.parametrize("version", [0, 1])
def test_turned_pictures_are_found_in_the_header(version: int) -> None:
    def header(matrix: tuple[int, ...]) -> np.ndarray:
        box = b"tkhd" + bytes([version, 0, 0, 3]) + bytes(32 if version else 20) + bytes(16)
        other = box + struct.pack(">9i", *nvdec.UPRIGHT) + bytes(8)  # the sound's track
        return np.frombuffer(other + box + struct.pack(">9i", *matrix) + bytes(8), np.uint8)

    assert not nvdec.turned(header(nvdec.UPRIGHT))
    assert nvdec.turned(header((0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)))
    assert not nvdec.turned(np.frombuffer(b"no such box", np.uint8))


def test_files_that_cannot_be_loaded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "large.mp4").write_bytes(bytes(100))
    monkeypatch.setattr(nvdec, "LARGEST", 99)
    jobs = [Job(str(tmp_path / name), np.zeros(1)) for name in ("empty.mp4", "large.mp4", "gone.mp4")]
    reasons = [refused.reason for refused in Nvdec(None).read(jobs)]
    assert reasons[0] == "empty file" and "larger" in reasons[1] and "No such file" in reasons[2]


def test_dali_reads_the_frames_asked_for_and_one_file_fails_alone(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia-dali belongs to the extra gpu")
    paths = [str(media.video(tmp_path / f"{i}.avi", frames=20 + i)) for i in range(nvdec.LANES + 3)]
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    frames = np.array([0, 3, 17])
    jobs = [Job(path, frames) for path in paths]
    jobs[2] = Job(str(tmp_path / "text.mp4"), frames)
    jobs[5] = Job(paths[5], np.array([3, 60]))  # 25 frames
    jobs[6] = Job(paths[6], np.array([25]))
    reader = Nvdec(None)
    for _ in range(2):
        read = reader.read(jobs)
        for i, clip in enumerate(read):
            if i in (2, 5):
                assert isinstance(clip, Refused) and clip.reason
                continue
            assert clip.dtype == torch.uint8 and media.frame_numbers(clip.numpy()) == list(jobs[i].frames)
            exact = decode.Video(jobs[i].path).read(jobs[i].frames)
            assert (clip.int() - torch.from_numpy(exact).int()).abs().max() <= 3
    assert "Invalid data" in read[2].reason and "out-of-bounds" in read[5].reason
