"""The drawing of a placement and its balance: who holds what, what crosses, who waits, what is better."""

from __future__ import annotations

import re

import pytest

from nextvid_mcore import cli, flops
from nextvid_mcore.config import RunConfig
from nextvid_mcore.parallel.balance import (
    NARROW,
    Link,
    balance,
    best_split,
    chain,
    flags,
    run_speed,
    span,
)
from nextvid_mcore.parallel.memory import rank_memory
from nextvid_mcore.parallel.placement import Placement, resolve_placement
from nextvid_mcore.parallel.plan import WIDTH, describe
from nextvid_mcore.parallel.seating import crossings
from nextvid_mcore.parallel.stages import stage_layers

TWO, THREE = "--parallel.placement two-groups ", "--parallel.placement three-groups "
CASES = {
    "one": ("tiny", 1),
    "tp2-pp2": (
        "tiny --parallel.encoder.tensor 2 --parallel.encoder.pipeline 2 --train.micro-batch 2 "
        "--train.global-batch 8",
        8,
    ),
    "generator-data": ("vit_g --parallel.encoder.tensor 2 --parallel.generator.data 8", 8),
    "wide": ("vit_g --parallel.encoder.tensor 2 --parallel.encoder.pipeline 2", 96),
    "6-2": (f"vit_g {TWO} --parallel.generator.data 2", 8),
    "reference": (f"vit_g {TWO} --parallel.generator.data 4 --parallel.reference generator", 8),
    "three": (
        f"vit_g {THREE} --parallel.encoder.pipeline 2 --parallel.predictor.data 2 --parallel.decoder.data 2",
        8,
    ),
    "three-wide": (f"vit_l {THREE} --parallel.predictor.data 16 --parallel.decoder.data 16", 64),
    "tiny": (f"tiny {TWO} --train.micro-batch 2 --train.global-batch 8", 3),
    "no-alignment": (f"vit_l {THREE} --model.align False", 6),
}


def read(name: str) -> tuple[RunConfig, Placement, str]:
    line, world = CASES[name]
    config, _ = cli.parse([*line.split(), "--dry-run"])
    return config, resolve_placement(config, world), describe(config, world)


def table(text: str, start: str) -> list[list[str]]:
    """The words of every line from the one that begins with `start` to the next empty one."""
    part = text[text.index(start) :].split("\n\n")[0]
    return [line.split() for line in part.splitlines()[2:]]


@pytest.mark.parametrize("name", CASES)
def test_the_drawing_fits_and_has_every_rank_once(name: str):
    config, placement, text = read(name)
    assert max(map(len, text.splitlines())) <= WIDTH
    ranks: list[int] = []
    for words in table(text, "Layers of every role"):
        if re.fullmatch(r"\d+(-\d+)?", words[0]):
            first, _, last = words[0].partition("-")
            ranks += range(int(first), int(last or first) + 1)
    assert ranks == list(range(placement.world))


def test_cells_say_who_holds_what():
    _, _, text = read("tp2-pp2")
    rows = {words[0]: words[1:] for words in table(text, "Layers of every role")}
    assert rows["0"][:3] == ["0", "0", "0"] and rows["3"][:3] == ["1", "1", "0"]
    assert rows["4"][:3] == ["0", "0", "1"]
    first, last = " ".join(rows["0"][3:]), " ".join(rows["4"][3:])
    assert first.count("/ 2") == 2 and " . . " in first and last.count("/ 2") == 4
    layers = int(rows["0"][3]) + int(rows["4"][3])
    assert layers == 4

    _, _, text = read("reference")
    rows = {words[0]: words[1:] for words in table(text, "Layers of every role")}
    assert rows["0"][3:] == ["40", "(40)", ".", ".", "1,012.7M"]
    assert rows["4"] == ["0", "0", "0", ".", "40", "12", "12", "54.5M"]
    assert "encoder -> generator: the reference's weights, 1.9 GiB a step" in text


@pytest.mark.parametrize("name", CASES)
def test_the_chain_does_all_the_work(name: str):
    """FLOPs of all links are those of all clips of a micro-batch."""
    config, placement, _ = read(name)
    for stage in config.stages:
        step, even = balance(config, placement, stage), balance(config, placement, stage, narrow=0.0)
        clips = config.micro_batch(stage) * placement.encoder.layout.data
        each = flops.clip_flops(config, stage, executed=True).total + flops.target_flops(config, stage)
        assert step.flops == pytest.approx(clips * each) and even.total == pytest.approx(clips * each)
        assert step.total > even.total  # predictor and decoder are narrower than the encoder
        assert step.ranks == placement.world
        assert 0 < step.speed <= step.ceiling + 1e-9 <= 1 + 2e-9
        for link in step.links:
            assert step.waits(link) == pytest.approx(step.imbalance(link) + step.bubble())
            assert -1e-9 <= step.imbalance(link) <= step.waits(link) + 1e-9 <= 1


@pytest.mark.parametrize("name", ["6-2", "reference", "three", "no-alignment"])
def test_seats_of_their_own_hold_their_roles_alone(name: str):
    config, placement, _ = read(name)
    count = flops.parameters(config.model, flops.target_channels(config))
    stage = config.stages[0]
    memory = [rank_memory(config, placement, rank, stage) for rank in range(placement.world)]
    trained = sum(
        (m.gradients / 4) / placement.seats_of_rank(rank)[0].layout.data for rank, m in enumerate(memory)
    )
    assert trained == pytest.approx(count.student + count.predictor + count.decoder)
    assert sum(m.optimizer for m in memory) == pytest.approx(12 * trained + 4 * count.encoder)
    everywhere = {"encoder", placement.seat_of("reference").name}
    for rank, m in enumerate(memory):
        assert (m.reference > 0) == (placement.seats_of_rank(rank)[0].name in everywhere)


def test_encoder_stages_are_equal_when_the_generator_sits_elsewhere():
    config, _, _ = read("three")
    assert stage_layers(config, 2) == [20, 20]
    config, _, _ = read("wide")
    first, last = stage_layers(config, 2)
    assert first + last == 40 and first > last  # the last stage has predictor, decoder and target too


@pytest.mark.parametrize(
    ("forward", "backward", "count", "expected"),
    [
        ((1, 1), (2, 2), 1, 6),  # one after the other
        ((1, 1), (2, 2), 10, 33),  # (count + links - 1) x 3
        ((1, 1, 1), (2, 2, 2), 10, 36),
        ((1, 2), (2, 4), 10, 1 + 60 + 2),  # the heavier last link never waits once it has begun
        ((2, 1), (4, 2), 100, 601),  # the heavier first link waits once, for the first gradient,
    ],
)
def test_span_of_a_chain(forward, backward, count, expected):
    links = [
        Link("x", None, 1, 0.0, f, b, len(forward) - 1 - i)
        for i, (f, b) in enumerate(zip(forward, backward, strict=True))
    ]
    assert span(links, count) == pytest.approx(expected)


def test_a_pass_ahead_keeps_the_others_waiting():
    """The same work inside the micro-batch overlaps with the next seat's."""
    ahead = [Link("a", None, 1, 2.0, 1.0, 2.0, 1), Link("b", None, 1, 0.0, 2.0, 3.0, 0)]
    inside = [Link("a", None, 1, 0.0, 3.0, 2.0, 1), Link("b", None, 1, 0.0, 2.0, 3.0, 0)]
    assert span(ahead, 50) == pytest.approx(100 + 1 + 250 + 2)
    assert span(inside, 50) <= 250 + 10


def test_the_papers_split_balances():
    """ViT-G at tau 4 without the target: 7.4 and 7.2 TFLOP a clip; executed, without the student's last
    frame, a little less even."""
    config, placement, _ = read("reference")
    nominal = flops.clip_flops(config, config.stages[0])
    other = nominal.reference + nominal.predictor + nominal.decoder
    assert nominal.student / 1e12 == pytest.approx(7.4, abs=0.1) and other / 1e12 == pytest.approx(
        7.2, abs=0.1
    )
    assert chain(config, placement, config.stages[0], target=False)[1].work > 0
    even, timed = (
        balance(config, placement, config.stages[0], target=False, narrow=x) for x in (0.0, NARROW)
    )
    assert even.ceiling == pytest.approx(0.94, abs=0.005)
    assert timed.ceiling == pytest.approx(0.80, abs=0.005)  # two H200 reached 0.76, filling and draining


def test_warnings_name_what_is_better():
    config, placement, text = read("6-2")
    assert "WARNING: over 20%: encoder waits 53% of warmup" in text
    better, speed = best_split(config, placement.world)
    said = " ".join(text.split())
    assert flags(better) in said and f"Better balanced, {speed:.2f}" in said
    again, _ = cli.parse([*f"vit_g {flags(better)} --dry-run".split()])
    assert run_speed(again, resolve_placement(again, 8)) == pytest.approx(speed)
    assert speed > run_speed(config, placement)
    assert best_split(again, 8)[0] == again  # nothing beats the best
    assert "No other split" in describe(again, 8) or "WARNING" not in describe(again, 8)
    assert "WARNING" not in read("one")[2]


def test_bytes_that_cross():
    """ViT-G in bf16: the context at the predictor's width, features of the 7 predicted frames."""
    config, placement, text = read("6-2")
    context, features = 7 * (96 + 48) * 384 * 2, 7 * 256 * 1408 * 2
    (edge,) = crossings(config, placement, config.stages[0])
    assert (edge.forward, edge.backward) == (context + features, context + features)
    assert f"{(context + features) / 2**20:.1f} MiB a clip" in text
    direct = config.altered(parallel={"edge": "direct"})  # no gradient of features that need none
    (edge,) = crossings(direct, placement, config.stages[0])
    assert (edge.forward, edge.backward) == (context + features, context)
    config, placement, _ = read("no-alignment")
    first, second = crossings(config, placement, config.stages[0])
    assert first.forward == context and second.forward == 2 * 7 * 256 * 384 * 2
    assert crossings(*read("wide")[:2], config.stages[0]) == []
