"""Which item a sample is: pure, weighted, the same in every layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import media
import pytest

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, SetConfig
from nextvid_mcore.data.manifest import Item, Manifest
from nextvid_mcore.data.sampler import Mixture, build_mixture, rank_batches
from nextvid_mcore.schedule import Schedule

MIX = Mixture(("a", "b", "c"), (10, 1000, 7), (0.5, 0.3, 0.2), "")


def test_weights_first_the_set_then_the_item() -> None:
    draws = [MIX.draw(3, index) for index in range(4000)]
    shares = Counter(name for name, _ in draws)
    for name, weight in zip(MIX.names, MIX.weights, strict=True):
        # four standard deviations of a binomial share
        assert shares[name] / 4000 == pytest.approx(weight, abs=4 * (weight * (1 - weight) / 4000) ** 0.5)
    rows = Counter(row for name, row in draws if name == "a")
    assert set(rows) == set(range(10)) and min(rows.values()) > 130  # 200 expected, deviation 13


def test_a_draw_is_pure_and_depends_on_all_it_should() -> None:
    assert MIX.draw(3, 17, 2) == MIX.draw(3, 17, 2)
    assert [MIX.draw(3, i) for i in range(30)] != [MIX.draw(4, i) for i in range(30)]
    tries = [MIX.draw(3, 1, attempt) for attempt in range(8)]
    assert len({name for name, _ in tries}) == 1, "a redraw stays in the set"
    large = next(i for i in range(50) if MIX.draw(3, i)[0] == "b")
    assert len({MIX.draw(3, large, attempt) for attempt in range(8)}) > 4


def test_held_out_samples_take_every_row_once_before_one_comes_again() -> None:
    draws = [MIX.held_out(index) for index in range(40)]
    counts = Counter(name for name, _ in draws)
    for name, weight in zip(MIX.names, MIX.weights, strict=True):
        assert abs(counts[name] - 40 * weight) <= 2  # a golden-ratio sequence, not luck
    for name, rows in zip(MIX.names, MIX.rows, strict=True):
        mine = [row for which, row in draws if which == name]
        first = mine[:rows]
        assert len(set(first)) == len(first) and all(0 <= row < rows for row in mine)
    spread = sorted(row for which, row in draws if which == "b")
    assert spread[0] < 250 and spread[-1] > 750, "rows come from all over the set"
    assert MIX.held_out(5, 1) != MIX.held_out(5) and MIX.held_out(5, 1)[0] == MIX.held_out(5)[0]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    sets = {name: [Item("/x.mp4", "video")] * rows for name, rows in (("k400", 6), ("ssv2", 2), ("web", 4))}
    return Manifest.open(media.manifest(tmp_path, **sets))


def test_weights_are_renormalised_and_it_is_said(manifest: Manifest) -> None:
    mixture = build_mixture(manifest, recipes.get("vit_l").data.sets)
    assert dict(zip(mixture.names, mixture.weights, strict=True)) == pytest.approx(
        {"ssv2": 0.05 / 0.23, "k400": 0.18 / 0.23}
    )
    assert "not in the manifest: imagenet 0.25, internvid 0.2, own 0.32" in mixture.note
    assert "renormalised" in mixture.note and "not drawn from: web" in mixture.note


def test_without_sets_all_are_drawn_by_size(manifest: Manifest) -> None:
    mixture = build_mixture(manifest)
    assert mixture.weights == pytest.approx((6 / 12, 2 / 12, 4 / 12))
    assert "renormalised" not in mixture.note


def test_impossible_mixtures(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="k400, ssv2, web and none of the wanted sets own"):
        build_mixture(manifest, (SetConfig("own", 1),))
    with pytest.raises(ConfigError, match="twice"):
        build_mixture(manifest, (SetConfig("k400", 1), SetConfig("k400", 2)))


@pytest.mark.parametrize(("size", "micro"), [(1, 4), (2, 2), (4, 1), (2, 1), (1, 1)])
def test_every_layout_sees_the_same_samples_in_a_step(size: int, micro: int) -> None:
    """tiny: stage 3 begins at step 100 with 16 frames and half the batch."""
    start, stop = 98, 103
    schedule = Schedule(recipes.get("tiny").altered(train={"steps": stop}))
    streams = [list(rank_batches(schedule, start, r, size, lambda _: micro)) for r in range(size)]
    place = 0
    for step in range(start, stop):
        point = schedule.at(step)
        count = point.batch // (micro * size)
        requests = [request for stream in streams for request in stream[place : place + count]]
        place += count
        assert {request.frames for request in requests} == {point.stage.frames}
        seen = sorted(index for request in requests for index in request.indices)
        assert seen == list(range(point.samples_before, point.samples_before + point.batch))
    assert all(len(stream) == place for stream in streams)


def test_resuming_continues_the_stream() -> None:
    schedule = Schedule(recipes.get("tiny"))
    whole = list(rank_batches(schedule, 0, 1, 2, lambda _: 2))
    assert whole[-20:] == list(rank_batches(schedule, 100, 1, 2, lambda _: 2))
    assert whole[0] == (8, (2, 3)) and whole[1] == (8, (6, 7))


def test_an_indivisible_batch_is_said() -> None:
    with pytest.raises(ConfigError, match="batch of 8 clips .* micro-batches of 3 on 2 .* divisible by 6"):
        next(rank_batches(Schedule(recipes.get("tiny")), 0, 0, 2, lambda _: 3))
