"""What is recorded as a CUDA graph is one function; run eagerly on a CPU it equals the engine's passes."""

from __future__ import annotations

import dataclasses

import parity
import pytest
import torch
from launch import shared

from nextvid_mcore.config import ConfigError, RoleParallel
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.training import graphs


def engine_and_recorded_pass(switches: dict) -> list:
    """Losses, monitors and gradients of both, in an order."""
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    config = parity.small()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **switches))
    init_distributed()
    seats = build_seats(resolve_placement(config, 1))
    seed_trackers(0, seats.home)
    step = TrainStep(config, seats)
    point = parity.schedule(config).at(0)
    clips = parity.clips(config, point, 0, 1)
    found = []
    for recorded in (False, True):
        if recorded:
            graphs.WARM = len(clips)  # no pass is recorded where there is no CUDA
            step.engine.graphs = graphs.Graphs(step.model, step.device)
        losses, monitors = step.gradients(point, clips)
        named = step.model.named_parameters()
        found.append((losses, monitors, {n: p.main_grad.clone() for n, p in named if p.requires_grad}))
    return found


@pytest.mark.parametrize("switches", [{}, {"generate": False}, {"align": False}])
def test_recorded_pass_equals_the_engine(switches: dict) -> None:
    engine, recorded = shared(1).run(engine_and_recorded_pass, switches)[0]
    assert recorded[0] == pytest.approx(engine[0], rel=1e-6)
    assert recorded[1] == pytest.approx(engine[1], rel=1e-5)
    for name, grad in engine[2].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(recorded[2][name], grad)


def test_what_cannot_be_recorded_is_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for world, changes, words in (
        (2, {"parallel": {"encoder": RoleParallel(tensor=2)}}, "tensor 2"),
        (2, {"parallel": {"encoder": RoleParallel(pipeline=2)}}, "pipeline 2"),
        (1, {"mask": {"mode": "packed"}}, "packed"),
        (1, {"parallel": {"recompute": "full"}}, "recompute full"),
    ):
        config = parity.small()
        for part, fields in changes.items():
            config = dataclasses.replace(
                config, **{part: dataclasses.replace(getattr(config, part), **fields)}
            )
        placement = resolve_placement(config, world)
        assert not graphs.wanted(config, placement)
        on = dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs="on"))
        with pytest.raises(ConfigError, match=words):
            graphs.wanted(on, placement)
    assert graphs.wanted(parity.small(), resolve_placement(parity.small(), 1))
