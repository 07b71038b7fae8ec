"""What is recorded as a CUDA graph is one function; run eagerly on a CPU it equals the engine's passes."""

from __future__ import annotations

from unittest import mock

import parity
import pytest
import torch
from launch import RankFailure, shared

from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig
from nextvid_mcore.parallel import plan
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.training import graphs
from nextvid_mcore.training import step as training_step

TENSOR = {"encoder": RoleParallel(tensor=2)}
LAYOUTS = {
    "tp2": TENSOR,
    "tp2-sp": {**TENSOR, "sequence": True},
    "tp2-sp-generator-dp2": {**TENSOR, "sequence": True, "generator": RoleParallel(data=2)},
    "dp2": {},
}


def gradients(step: training_step.TrainStep) -> tuple:
    """Losses, monitors and gradients of the first step."""
    point = parity.schedule(step.config).at(0)
    home, micro = step.seats.home, step.seats.placement.clips(step.seats.mine[0], point.micro_batch)
    clips = parity.clips(step.config, point, home.data_rank, home.layout.data, micro)
    return (*step.gradients(point, clips), parity.gradients(step))


def same(found: tuple, wanted: tuple) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    for name, grad in wanted[2].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[2][name], grad)


def engine_and_recorded_pass(config: RunConfig) -> list:
    step = parity.built(config)
    eager = gradients(step)
    step.engine.graphs = graphs.Graphs(step.engine)
    with (
        mock.patch.object(graphs, "WARM", parity.BATCH),  # no pass is recorded where there is no CUDA
        graphs.recordable(),
    ):
        return [eager, gradients(step)]


@pytest.mark.parametrize("switches", [{}, {"generate": False}, {"align": False}])
def test_recorded_pass_equals_the_engine(switches: dict) -> None:
    engine, recorded = shared(1).run(engine_and_recorded_pass, parity.small().altered(model=switches))[0]
    same(recorded, engine)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_pass_of_several_ranks_equals_the_engine(layout: str) -> None:
    config = parity.small(**LAYOUTS[layout]).altered(train={"micro_batch": 2})
    for engine, recorded in shared(2).run(engine_and_recorded_pass, config):
        same(recorded, engine)


def taking_turns(config: RunConfig) -> list[list[str]]:
    """Warnings up to each of some steps, whose micro-batches have one clip, two, one, ..."""
    step, point = parity.built(config), parity.schedule(config).at(0)
    step.engine.graphs = graphs.Graphs(step.engine)
    warnings, found = [], []
    with (
        mock.patch.object(graphs, "WARM", parity.BATCH * 8),
        mock.patch.object(graphs.log, "warning", lambda text, *args: warnings.append(text % args)),
        graphs.recordable(),
    ):
        for micro in (1, 1, 2, 2, 1, 2):
            step.gradients(point, parity.clips(config, point, 0, 1, micro))
            found.append(list(warnings))
    return found


def test_shapes_that_take_turns_are_said_once() -> None:
    """A stage's change is none: its shapes don't come again."""
    *one_change, again, last = shared(1).run(taking_turns, parity.small())[0]
    assert one_change == [[]] * 4
    assert again == last and len(again) == 1 and "(video 1 x 3 x " in again[0]


class FailingRecord:
    """Stands for torch.cuda.graph: the recording's end raises, after all or a part of the pass was done."""

    def __init__(self, graph: object, pool: object, **settings: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None:
        raise RuntimeError("capture was invalidated\nand some more lines")


class FailingOnRank1(FailingRecord):
    def __exit__(self, *error: object) -> None:
        if torch.distributed.get_rank() == 1:
            super().__exit__(*error)


def failed_recording(
    choice: str, early: bool, parallel: dict | None = None, recording: type = FailingRecord
) -> tuple[list, list[str], bool]:
    """Of an eager step and two that can't be recorded: what `gradients` gives, warnings, and what is left.

    early: the pass raises when the student's gradient is half done.
    """
    config = parity.small(**parallel or {}).altered(train={"cuda_graphs": choice})
    with (
        mock.patch.object(plan, "_check_machine"),
        mock.patch.object(graphs, "refusal", lambda *_: None),
        mock.patch.object(graphs, "own_stream"),
    ):
        step = parity.built(config)
    recorder, step.engine.graphs = step.engine.graphs or graphs.Graphs(step.engine), None
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
        mock.patch.object(torch.cuda, "graph_pool_handle"),
        mock.patch.object(torch._C, "_cuda_endAllocateToPool"),
        mock.patch.object(torch._C, "_cuda_releasePool") as released,
        mock.patch.object(torch.cuda, "graph", recording),
        mock.patch.object(training_step.log, "warning", lambda text, *args: warnings.append(text % args)),
    ):
        found += [gradients(step), gradients(step)]
    assert released.call_count == 1
    return found, warnings, step.engine.graphs is not None


@pytest.mark.parametrize(("early", "reason"), [(False, "capture was invalidated"), (True, "out of memory")])
def test_a_step_that_cannot_be_recorded_is_done_again_eagerly(early: bool, reason: str) -> None:
    assert graphs.WARM < parity.BATCH // parity.MICRO  # some passes are done before it fails
    (eager, *again), warnings, left = shared(1).run(failed_recording, "auto", early)[0]
    assert len(warnings) == 1 and f"(RuntimeError: {reason});" in warnings[0]
    assert "--train.cuda-graphs off" in warnings[0] and not left
    for each in again:
        same(each, eager)


def test_tensor_ranks_go_on_in_the_same_way() -> None:
    """The second fails to record, and the first leaves its recording too."""
    every = shared(2).run(failed_recording, "auto", False, LAYOUTS["tp2-sp"], FailingOnRank1)
    for reason, ((eager, *again), warnings, left) in zip(
        ("another tensor rank failed", "RuntimeError: capture was invalidated"), every, strict=True
    ):
        assert len(warnings) == 1 and f"({reason});" in warnings[0] and not left
        for each in again:
            same(each, eager)


def test_what_was_asked_for_and_fails_ends_the_run() -> None:
    with pytest.raises(RankFailure, match=r"ConfigError: train cuda_graphs on: .*\(RuntimeError: out of mem"):
        shared(1).run(failed_recording, "on", True)
    with pytest.raises(RankFailure, match=r"rank 0(.|\n)*cuda_graphs on: .*\(another tensor rank failed\)"):
        shared(2).run(failed_recording, "on", False, LAYOUTS["tp2-sp"], FailingOnRank1)


FP8 = {"model": {"backend": "te"}, "train": {"precision": "bf16"}}


def test_what_cannot_be_recorded_is_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for world, changes, words in (
        (2, {"parallel": {"placement": "two-groups"}}, "two-groups"),
        (2, {"parallel": {"encoder": RoleParallel(pipeline=2)}}, "pipeline 2"),
        (1, {"mask": {"mode": "packed"}}, "packed"),
        (1, {"parallel": {"recompute": "full"}}, "recompute full"),
    ):
        config = parity.small().altered(**changes)
        placement = resolve_placement(config, world)
        assert not graphs.wanted(config, placement)
        on = config.altered(train={"cuda_graphs": "on"})
        with pytest.raises(ConfigError, match=words):
            graphs.wanted(on, placement)
        with pytest.raises(ConfigError, match=f"cuda_graphs on: .*{words}.*; use --train.cuda-graphs auto"):
            plan.check(on, world, dry_run=True)
    again = {"recompute": "pieces"}
    low = FP8 | {"fp8": {"all": "current"}}
    for parallel, world, changes, recorded in (  # auto: what was seen on GPUs
        ({}, 1, {}, True),
        ({}, 2, {}, True),
        (TENSOR, 2, {}, True),
        (TENSOR, 2, low, False),
        (again, 1, {}, True),
    ):
        config = parity.small(**parallel).altered(**changes)
        placement = resolve_placement(config, world)
        assert graphs.wanted(config, placement) == recorded
        assert graphs.wanted(config.altered(train={"cuda_graphs": "on"}), placement)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_is_recorded_on_data_ranks(monkeypatch, ranks: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for recipe in ("current", "delayed", "blockwise"):
        config = parity.small().altered(**FP8, fp8={"all": recipe})
        assert graphs.wanted(config, resolve_placement(config, ranks))
