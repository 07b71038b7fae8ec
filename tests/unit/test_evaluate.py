"""The held-out loss: its table against a plain loop, its order, and what it may and may not depend on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from unit import media

from nextvid_mcore import cli
from nextvid_mcore.config import LossConfig
from nextvid_mcore.data.manifest import Item
from nextvid_mcore.models.nextvid import LossTerms
from nextvid_mcore.training.evaluate import Table
from nextvid_mcore.training.metrics import strict

B, M, P, K, BINS = 3, 2, 4, 5, 4


def terms(seed: int = 0, low_tau: bool = False) -> LossTerms:
    generator = torch.Generator().manual_seed(seed)
    flow, tau = (torch.rand(B, M, P, K, generator=generator) for _ in range(2))
    return LossTerms(
        flow=flow,
        align=torch.rand(B, M, P, generator=generator),
        tau=tau * (0.2 if low_tau else 1),
        z=torch.zeros(0),
        target=torch.zeros(0),
        aligned=torch.zeros(0),
    )


def test_summary_equals_a_plain_loop():
    found = terms()
    summary = Table.of([0, 1, 2], found, BINS).summary(LossConfig(flow=0.5, align=1.0))
    bins: list[list[float]] = [[] for _ in range(BINS)]
    frames: list[list[float]] = [[] for _ in range(P)]
    for b in range(B):
        for m in range(M):
            for p in range(P):
                for k in range(K):
                    value = found.flow[b, m, p, k].item()
                    bins[int(found.tau[b, m, p, k].item() * BINS)].append(value)
                    frames[p].append(value)
    assert summary["flow_by_tau"] == pytest.approx([sum(x) / len(x) for x in bins])
    assert summary["flow_by_frame"] == pytest.approx([sum(x) / len(x) for x in frames])
    assert summary["align_by_frame"] == pytest.approx(found.align.double().mean((0, 1)).tolist())
    assert summary["loss_flow"] == pytest.approx(found.flow.double().mean().item())
    assert summary["loss"] == 0.5 * summary["loss_flow"] + summary["loss_align"]


def test_the_order_of_arrival_changes_no_bit():
    parts = [Table.of([3 * i, 3 * i + 1, 3 * i + 2], terms(i), BINS) for i in range(4)]
    expected = Table.merged(parts, 12).summary(LossConfig())
    for order in ((3, 1, 0, 2), (1, 0, 3, 2)):
        assert Table.merged([parts[i] for i in order], 12).summary(LossConfig()) == expected
    with pytest.raises(RuntimeError, match="not 0 to 8"):  # a clip counted twice, or one missing
        Table.merged([parts[0], parts[1], parts[1]], 9)


def test_an_empty_tau_bin_is_null():
    summary = Table.of([0, 1, 2], terms(low_tau=True), BINS).summary(LossConfig())
    shown = json.loads(json.dumps(strict(summary), allow_nan=False))
    assert shown["flow_by_tau"][0] > 0 and shown["flow_by_tau"][1:] == [None] * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model on real files, in this process: (config, step, seats)."""
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.placement import resolve_placement
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    root = tmp_path_factory.mktemp("data")
    clips = [Item(str(media.video(root / f"{i}.avi", frames=20 + 3 * i)), "video") for i in range(3)]
    manifest = media.manifest(root / "val", clips=clips)
    config, _ = cli.parse(
        "tiny --dry-run --train.init-noise 0.05 --data.workers 0 --data.fps 25 --model.encoder.depth 1 "
        "--model.predictor.depth 1 --model.decoder.depth 1 --model.image-size 32 --mask.keep 0.5 0.25 "
        f"--stages.0.frames 4 --eval.samples 5 --eval.batch 2 --data.eval-manifest {manifest}".split()
    )
    init_distributed()
    seats = build_seats(resolve_placement(config, 1))
    seed_trackers(0, seats.home)
    return config, TrainStep(config, seats), seats


def test_repeats_exactly_and_leaves_no_trace(trained):
    from nextvid_mcore.training.evaluate import Evaluator

    config, step, seats = trained
    weights = [p.detach().clone() for p in step.model.parameters()]
    states = torch.get_rng_state()
    evaluator = Evaluator(config, step, seats)
    first = evaluator.run()
    assert evaluator.run() == first == Evaluator(config, step, seats).run()
    assert all(torch.equal(a, b) for a, b in zip(weights, step.model.parameters(), strict=True))
    assert torch.equal(states, torch.get_rng_state())
    assert first["samples"] == 5 and first["frames"] == 4
    assert first["ema"] == first["online"]  # the EMA starts at the weights


def test_depends_on_the_weights_and_not_on_the_seed_or_the_batch(trained):
    from nextvid_mcore.training.evaluate import Evaluator

    config, step, seats = trained
    base = Evaluator(config, step, seats).run()
    other = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=7),
        data=dataclasses.replace(config.data, flip=1.0),
        eval=dataclasses.replace(config.eval, batch=5),
    )
    run, step.model.run = step.model.run, other
    step.engine.config = other
    try:
        again = Evaluator(other, step, seats).run()
    finally:
        step.model.run = step.engine.config = run
    assert again["ema"]["loss"] == pytest.approx(base["ema"]["loss"], rel=1e-6)

    weight = step.model.student.encoder.block.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        weight.add_(0.5)
        moved = Evaluator(config, step, seats).run()
        weight.sub_(0.5)
    assert moved["online"]["loss"] != base["online"]["loss"]
    assert moved["ema"] == base["ema"]
