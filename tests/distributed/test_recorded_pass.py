"""What is recorded as a CUDA graph is one function; run eagerly on a CPU it equals the engine's passes."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import parity
import pytest
import torch
from launch import RankFailure, shared

from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.training import graphs
from nextvid_mcore.training import step as training_step


def built(config: RunConfig) -> Any:
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    init_distributed()
    seats = build_seats(resolve_placement(config, 1))
    seed_trackers(0, seats.home)
    return TrainStep(config, seats)


def gradients(step: Any) -> tuple:
    """Losses, monitors and gradients of the first step."""
    point = parity.schedule(step.config).at(0)
    losses, monitors = step.gradients(point, parity.clips(step.config, point, 0, 1))
    named = step.model.named_parameters()
    return losses, monitors, {n: p.main_grad.clone() for n, p in named if p.requires_grad}


def same(found: tuple, wanted: tuple) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    for name, grad in wanted[2].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[2][name], grad)


def engine_and_recorded_pass(switches: dict) -> list:
    config = parity.small()
    step = built(dataclasses.replace(config, model=dataclasses.replace(config.model, **switches)))
    eager = gradients(step)
    step.engine.graphs = graphs.Graphs(step.model, step.device)
    with mock.patch.object(graphs, "WARM", parity.BATCH):  # no pass is recorded where there is no CUDA
        return [eager, gradients(step)]


@pytest.mark.parametrize("switches", [{}, {"generate": False}, {"align": False}])
def test_recorded_pass_equals_the_engine(switches: dict) -> None:
    engine, recorded = shared(1).run(engine_and_recorded_pass, switches)[0]
    same(recorded, engine)


class FailingRecord:
    """Stands for torch.cuda.graph: the recording's end raises, after all or a part of the pass was done."""

    def __init__(self, graph: object, **settings: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None:
        raise RuntimeError("capture was invalidated\nand some more lines")


def failed_recording(choice: str, early: bool) -> tuple[list, list[str], bool]:
    """Of an eager step and two that can't be recorded: what `gradients` gives, warnings, and what is left.

    early: the pass raises when the student's gradient is half done.
    """
    config = parity.small()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=choice))
    with (
        mock.patch.object(graphs, "refusal", lambda *_: None),
        mock.patch.object(graphs, "own_stream"),
    ):
        step = built(config)
    recorder, step.engine.graphs = step.engine.graphs, None
    found, passes, warnings = [gradients(step)], [], []

    def fail(*_: object) -> None:
        passes.append(len(passes))
        if len(passes) == graphs.WARM + 1:
            raise RuntimeError("out of memory")

    if early:
        step.model.student.encoder.block.layers[2].register_full_backward_hook(fail)
    step.engine.graphs = recorder
    with (
        mock.patch.object(torch.cuda, "CUDAGraph"),
        mock.patch.object(torch.cuda, "graph", FailingRecord),
        mock.patch.object(training_step.log, "warning", lambda text, *args: warnings.append(text % args)),
    ):
        found += [gradients(step), gradients(step)]
    return found, warnings, step.engine.graphs is not None


@pytest.mark.parametrize(("early", "reason"), [(False, "capture was invalidated"), (True, "out of memory")])
def test_a_step_that_cannot_be_recorded_is_done_again_eagerly(early: bool, reason: str) -> None:
    assert graphs.WARM < parity.BATCH // parity.MICRO  # some passes are done before it fails
    (eager, *again), warnings, left = shared(1).run(failed_recording, "auto", early)[0]
    assert len(warnings) == 1 and f"(RuntimeError: {reason});" in warnings[0]
    assert "--train.cuda-graphs off" in warnings[0] and not left
    for each in again:
        same(each, eager)


def test_what_was_asked_for_and_fails_ends_the_run() -> None:
    with pytest.raises(RankFailure, match=r"ConfigError: train cuda_graphs on: .*\(RuntimeError: out of mem"):
        shared(1).run(failed_recording, "on", True)


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
