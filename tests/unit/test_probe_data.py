"""Presets against the paper's tables; segments, views and drawn clips of real files; unreadable ones."""

from dataclasses import replace
from pathlib import Path

import media
import numpy as np
import pytest
import torch

from nextvid_mcore.config import ConfigError
from nextvid_mcore.evaluation.datasets import (
    PLAIN,
    VIEWS,
    ListData,
    Request,
    build_data,
    lists_notes,
    segment_indices,
    view_crops,
)
from nextvid_mcore.evaluation.presets import PRESETS, ProbeConfig, preset

SMALL = ProbeConfig("custom", frames=4, rate=2, size=32, segments=3, views=3, batch=4, epochs=2)


def test_tables_9_and_10() -> None:
    rows = {
        name: (p.segments, p.views, p.frames, p.rate, p.size, p.batch, p.epochs, p.layers, p.heads)
        for name, p in PRESETS.items()
    }
    assert rows["k400"] == (8, 3, 16, 4, 256, 192, 20, 1, 16)
    assert rows["in1k"] == (1, 1, 16, 4, 256, 384, 20, 1, 16)
    assert rows["ssv2"] == (2, 3, 16, 4, 256, 96, 20, 1, 16)
    assert rows["diving48"] == (4, 3, 32, 2, 256, 48, 100, 4, 16)
    sizes = {name: (p.classes, p.train_items, p.val_items) for name, p in PRESETS.items()}
    assert sizes["k400"] == (400, 241_000, 20_000) and sizes["in1k"] == (1000, 1_280_000, 50_000)
    assert sizes["ssv2"] == (174, 169_000, 24_000) and sizes["diving48"] == (48, 15_000, 2_000)
    assert all(p.rate_is == "step" for p in PRESETS.values())
    assert PRESETS["ssv2"].flip == 0  # "left to right" is not "right to left"
    assert not PRESETS["k400"].mlp


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "magic"}, "attentive, linear, knn"),
        ({"rate": 2.5}, "rate-is fps"),
        ({"lrs": ()}, "sweep is empty"),
        ({"lrs": (0.1, 0.1)}, "twice"),
        ({"holdout": 1.0}, "holdout"),
        ({"views": 0}, "views must be 1"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset("k400", **change)
    with pytest.raises(ConfigError, match="no probe data set 'k4000'"):
        preset("k4000")


def test_segments_of_a_long_video_are_apart() -> None:
    got = segment_indices(total=100, step=2, frames=4, segments=4, places=None)  # parts of 25, clips of 7
    assert got[:, 0].tolist() == [9, 34, 59, 84] and (np.diff(got, axis=1) == 2).all()
    first = segment_indices(100, 2, 4, 4, [0, 0, 0, 0])[:, 0]
    last = segment_indices(100, 2, 4, 4, [0.999] * 4)[:, 0]
    assert first.tolist() == [0, 25, 50, 75] and last.tolist() == [18, 43, 68, 93]
    assert segment_indices(100, 2, 4, 4, [0.999] * 4).max() == 99


def test_segments_of_a_short_video_overlap() -> None:
    got = segment_indices(total=16, step=3, frames=4, segments=3, places=None)  # clips of 10
    assert got[:, 0].tolist() == [0, 3, 6] and got[-1, -1] == 15
    got = segment_indices(total=6, step=3, frames=4, segments=3, places=None)  # shorter than one clip
    assert got.tolist() == [[0, 3, 5, 5]] * 3
    assert segment_indices(5, 4, 16, 1, None)[0].tolist() == [0, 4] + [4] * 14


def test_views_lie_along_the_long_side() -> None:
    assert [tuple(c) for c in view_crops(48, 64, 3)] == [(0, 0, 48, 48), (0, 8, 48, 48), (0, 16, 48, 48)]
    assert [tuple(c) for c in view_crops(64, 48, 2)] == [(0, 0, 48, 48), (16, 0, 48, 48)]
    assert [tuple(c) for c in view_crops(48, 64, 1)] == [(0, 8, 48, 48)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of four videos, the third of which is broken."""
    folder = tmp_path_factory.mktemp("videos")
    for name in "abd":
        media.video(folder / f"{name}.avi", frames=40)
    media.truncated(folder / "c.avi", folder / "a.avi", 0.05)
    (folder / "list.csv").write_text("".join(f"{n}.avi {i % 2}\n" for i, n in enumerate("abcd")))
    return folder / "list.csv"


def test_readings_of_a_video(videos: Path) -> None:
    source = ListData(videos, SMALL)
    assert len(source) == 4 and source.tasks == {"label": 2}
    batch = source[Request(VIEWS, (0, 2))]
    assert batch.video.shape == (2, 3, 3, 3, 4, 32, 32)  # [B, views, segments, 3, T, H, W]
    assert batch.good.tolist() == [True, False] and batch.bad[0][0].endswith("c.avi")
    assert batch.label.tolist() == [[0], [0]]
    # parts of 13, clips of 7 in their middle; the right end of the frame shows the frame's number
    shown = batch.video[0, 2, :, 0, :, 16, -1].float()  # the rightmost view
    numbers = ((shown - 10) / media.STEP).round().int()
    assert numbers.tolist() == [[3, 5, 7, 9], [16, 18, 20, 22], [29, 31, 33, 35]]
    left, right = batch.video[0, 0, 0, 0, 0, 16], batch.video[0, 2, 0, 0, 0, 16]
    assert (left > left.min() + 10).sum() > (right > right.min() + 10).sum()  # bright half is on the left
    plain = source[Request(PLAIN, (0,))]
    assert torch.equal(plain.video[0, 0], batch.video[0, 1])  # the centre is the middle view


def test_drawn_clips_are_pure_and_differ(videos: Path) -> None:
    source = ListData(videos, replace(SMALL, flip=0.5))
    one, again = source[Request(0, (0, 1))], source[Request(0, (1,))]
    assert one.video.shape == (2, 1, 3, 3, 4, 32, 32)
    assert torch.equal(one.video[1], again.video[0])
    assert not torch.equal(source[Request(1, (1,))].video, again.video)


def test_rate_as_frames_a_second(videos: Path) -> None:
    source = ListData(videos, replace(SMALL, rate=5, rate_is="fps", segments=1))  # of 25: every fifth
    shown = source[Request(PLAIN, (0,))].video[0, 0, 0, 0, :, 16, -1].float()
    assert ((shown - 10) / media.STEP).round().diff().tolist() == [5, 5, 5]


def test_folders_of_classes_and_still_pictures(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for level, name in enumerate(("cat", "dog")):
            media.image(tmp_path / split / name / f"{split}.png", 50 + 100 * level)
    config = preset("in1k", classes=None, size=16, augment=0)
    train, val = build_data(config, str(tmp_path / "train"), str(tmp_path / "val"), "cpu")
    assert train.tasks == {"label": 2} and train.label.tolist() == [0, 1]
    video = val[Request(PLAIN, (1,))].video
    assert video.shape == (1, 1, 1, 3, 16, 16, 16) and (video == 150).all()
    frame, _ = build_data(config, str(tmp_path / "train"), str(tmp_path / "val"), "cpu", per_frame=True)
    assert frame[Request(PLAIN, (1,))].video.shape == (1, 1, 1, 3, 1, 16, 16)
    with pytest.raises(ConfigError, match="2 of 2 items .* are training items too"):
        build_data(config, str(tmp_path / "train"), str(tmp_path / "train"), "cpu")
    with pytest.raises(ConfigError, match="needs --train and --val"):
        build_data(config, None, None, "cpu")


def test_class_folders_mean_the_same_in_both_sets(tmp_path: Path) -> None:
    """A validation folder may lack a class: its folders are numbered by the training set's names."""
    for name in ("ant", "bee", "cat"):
        media.image(tmp_path / "train" / name / "1.png")
    for name in ("bee", "cat"):
        media.image(tmp_path / "val" / name / "2.png")
    train, val = build_data(SMALL, str(tmp_path / "train"), str(tmp_path / "val"), "cpu")
    assert train.label.tolist() == [0, 1, 2] and val.label.tolist() == [1, 2]
    assert val.tasks == {"label": 3}
    media.image(tmp_path / "val" / "dog" / "2.png")
    with pytest.raises(ConfigError, match="dog is none of the training"):
        build_data(SMALL, str(tmp_path / "train"), str(tmp_path / "val"), "cpu")
    (tmp_path / "train.csv").write_text("train/ant/1.png 0\ntrain/bee/1.png 1\n")
    with pytest.raises(ConfigError, match="3 class folders and the training list 2"):
        build_data(SMALL, str(tmp_path / "train.csv"), str(tmp_path / "val"), "cpu")


def test_lists_of_files_that_are_not_there_and_shared_ones(tmp_path: Path) -> None:
    for i in range(30):
        media.image(tmp_path / f"{i}.png")

    def listed(name: str, numbers: range) -> str:
        (tmp_path / name).write_text("".join(f"{i}.png 0\n" for i in numbers))
        return str(tmp_path / name)

    assert len(ListData(listed("a.csv", range(0, 31)), SMALL)) == 31  # one of them is missing
    with pytest.raises(ConfigError, match="2 of 12 files looked at are not there, .*30.png"):
        ListData(listed("b.csv", range(20, 32)), SMALL)
    with pytest.raises(ConfigError, match="1 of 15 items .* are training items too"):
        build_data(SMALL, listed("c.csv", range(0, 16)), listed("d.csv", range(15, 30)), "cpu")


def test_bad_lists(tmp_path: Path) -> None:
    media.image(tmp_path / "a.png")
    listed = tmp_path / "list.csv"
    for text, message in (
        ("a.png\n", "has no label"),
        ("a.png 7\n", "label 7, but there are 2 classes"),
        ("a.txt 0\n", "neither video nor image"),
        ("a.png 0\nb.mp4 1\n", "mixes images and videos"),
    ):
        listed.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ListData(listed, SMALL, classes=2)
    with pytest.raises(ConfigError, match="there is no"):
        ListData(tmp_path / "none.csv", SMALL)
    listed.write_bytes(b'\xef\xbb\xbfa.png 1\r\n\r\n"a.png" 0\r\n')  # as a table's editor writes it
    assert [Path(path).name for path in ListData(listed, SMALL).paths] == ["a.png", "a.png"]
    listed.write_text("a.png 1\na.png 2\n")
    with pytest.raises(ConfigError, match="label 2, but .* labels count from 0, and none is 0 here"):
        ListData(listed, SMALL, classes=2)


def test_what_is_odd_about_lists_is_said(tmp_path: Path) -> None:
    for i in range(8):
        media.image(tmp_path / f"{i}.png")
    for name, rows in (("train", "1122"), ("val", "1333")):
        first = 0 if name == "train" else 4
        lines = [f"{first + i}.png {label}\n" for i, label in enumerate(rows)]
        (tmp_path / f"{name}.csv").write_text("".join([*lines, lines[0]]))
    config = replace(SMALL, classes=4)
    train, val = build_data(config, str(tmp_path / "train.csv"), str(tmp_path / "val.csv"), "cpu")
    notes = lists_notes(train, val)
    assert any("train.csv: 1 of 5 lines name a file once more" in note for note in notes)
    assert any("val.csv: 1 of 5 lines name a file once more" in note for note in notes)
    assert any("3 validation items have labels that no training item has, e.g. 3" in note for note in notes)
    assert any("training labels are 1 to 2: class 0 is there, empty" in note for note in notes)
    (tmp_path / "one.csv").write_text("0.png 1\n1.png 1\n")
    with pytest.raises(ConfigError, match="one.csv have label 1: there is nothing to tell apart"):
        build_data(config, str(tmp_path / "one.csv"), str(tmp_path / "val.csv"), "cpu")
