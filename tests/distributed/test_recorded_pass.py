"""What is recorded as a CUDA graph is one function; run eagerly on a CPU it equals the engine's passes.

Recorded without CUDA (`Recorder`), it is compared with an eager pass, and left where a replay differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from unittest import mock

import parity
import pytest
import torch
from launch import RankFailure, shared

from nextvid_mcore import masking
from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig
from nextvid_mcore.parallel import mailbox, plan, split
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.placement import Placement, resolve_placement
from nextvid_mcore.training import graphs, microbatch
from nextvid_mcore.training import step as training_step
from nextvid_mcore.training.microbatch import Outline
from nextvid_mcore.training.optimizer import StepOutcome

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


def exchanges_of_both(config: RunConfig) -> tuple[list, list[int]]:
    """`engine_and_recorded_pass` where passes that are recorded exchange rows beside their products.

    Returns:
        That, and how many exchanges the mailbox had seen before the recorded pass and after it.
    """
    opened, seen = [], []
    inner, make = mailbox.SentMailbox.open, graphs.Graphs.__init__

    def graphs_made(self: graphs.Graphs, *args: object) -> None:
        seen.append(len(opened))
        make(self, *args)

    def overlap(config: RunConfig, placement: Placement, layout: Layout) -> str:
        return "recorded" if layout.sequence else "never"

    with (
        mock.patch.object(split, "overlap", overlap),
        mock.patch.object(mailbox.SentMailbox, "open", lambda *args: opened.append(inner(*args))),
        mock.patch.object(graphs.Graphs, "__init__", graphs_made),
    ):
        found = engine_and_recorded_pass(config)
    return found, [*seen, len(opened)]


def test_passes_that_are_recorded_exchange_beside_products_and_eager_ones_in_line() -> None:
    config = parity.small(**LAYOUTS["tp2-sp-generator-dp2"]).altered(train={"micro_batch": 2})
    for (engine, recorded), (before, after) in shared(2).run(exchanges_of_both, config):
        same(recorded, engine)
        layers, passes = config.model.encoder.depth, parity.BATCH // 2
        assert (before, after) == (0, passes * layers * (4 + 4 + 4))  # reference, student, student backward


def three_steps(config: RunConfig, way: str) -> dict:
    """Of three steps, the second not finite, the last of another stage: what they did, and masks drawn in it.

    way: the micro-batch of which a step knows, the next one or another; at once: each begins as a first one.
    """
    step, schedule = parity.built(config), parity.schedule(config)
    step.engine.graphs, update = graphs.Graphs(step.engine), step.optimizers.step
    points, home = [schedule.at(i) for i in range(3)], step.seats.home
    micro = step.seats.placement.clips(step.seats.mine[0], points[0].micro_batch)
    clips = [parity.clips(config, point, home.data_rank, home.layout.data, micro) for point in points]
    drawn, results = [], []

    def draw(*args: object) -> masking.ClipMasks:
        drawn[-1] += 1
        return masking.draw_masks(*args)

    def broken(*args: object) -> StepOutcome:
        if len(drawn) == 2:
            next(step.model.predictor.parameters()).main_grad.fill_(math.nan)
        return update(*args)

    step.optimizers.step = broken
    with (
        mock.patch.object(graphs, "WARM", parity.BATCH * 8),
        mock.patch.object(microbatch, "draw_masks", draw),
        graphs.recordable(),
    ):
        for i, point in enumerate(points):
            coming = None
            if way != "at once" and i + 1 < len(points):
                of = i + 1 if way == "next" else 0
                coming = Outline.of(clips[of][0], points[of].stage.tau_samples)
            step._forgotten &= way != "at once"
            drawn.append(0)
            results.append(dataclasses.asdict(step.run(point, clips[i], coming)))
    weights = [p.detach().clone() for p in step.model.parameters()]
    return {"results": results, "weights": weights, "drawn": drawn, "once": drawn[0] // len(clips[0])}


@pytest.mark.parametrize("layout", ["one", "tp2-sp-generator-dp2"])
def test_what_a_step_does_for_the_next_changes_nothing(layout: str) -> None:
    parallel, ranks = LAYOUTS.get(layout, {}), 1 + (layout in LAYOUTS)
    config = parity.small(**parallel).altered(train={"micro_batch": 2})
    found = {way: shared(ranks).run(three_steps, config, way) for way in ("at once", "next", "another")}
    for usual, right, wrong in zip(*found.values(), strict=True):
        assert [x["applied"] for x in usual["results"]] == [True, False, True]
        for each in (right, wrong):
            assert repr(each["results"]) == repr(usual["results"])  # one has a norm of nan
            assert all(torch.equal(a, b) for a, b in zip(each["weights"], usual["weights"], strict=True))
        a_step, once = usual["drawn"][0], usual["once"]  # a rank may draw for its share too
        assert usual["drawn"] == [a_step] * 3 and once < a_step
        assert right["drawn"] == [a_step + once, a_step, a_step - once]
        assert wrong["drawn"] == [a_step + once, a_step + once, a_step]


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


class Graph:
    """Stands for torch.cuda.CUDAGraph: to replay it is to run the pass once more, on the recorded inputs."""

    def reset(self) -> None: ...


class Recorder:
    """Stands for torch.cuda.graph and its surroundings; has a `fault` on `rank`, or on all.

    raises: amid the recorded backward pass. end: when the recording ends.
    overflow: in the eager pass that is to be compared. old masks: the pass reads others than its inputs.
    The rest: in replays.
    """

    def __init__(self, fault: str, rank: int | None) -> None:
        here = rank in (None, torch.distributed.get_rank())
        self.fault, self.pass_ = fault if here else "", graphs.Graphs.pass_
        self.eager = self.replays = 0
        self.recording: Graph | None = None

    @contextlib.contextmanager
    def record(self, graph: Graph, pool: object, **settings: object) -> Iterator[None]:
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
        if self.fault == "end":
            raise RuntimeError("capture was invalidated\nand some more lines")

    def run(self, recorder: graphs.Graphs, *args: object) -> graphs.LossTerms:
        """In the place of `Graphs.pass_`."""
        named = recorder.model.named_parameters()
        grads = {name: p.main_grad for name, p in named if p.requires_grad}
        before = {name: x.clone() for name, x in grads.items()}
        if self.fault == "old masks":
            batch, share, inputs, count = args
            args = batch, share, dataclasses.replace(inputs, tokens=batch.masks.tokens), count
        terms = self.pass_(recorder, *args)
        if self.recording is None:
            self.eager += 1
            if self.fault == "overflow" and self.eager == 5:
                next(iter(grads.values())).fill_(math.inf)
            return terms
        for name, x in before.items():  # CUDA runs nothing while it records
            grads[name].copy_(x)

        def replay() -> None:
            self.replays += 1
            before = {name: x.clone() for name, x in grads.items()}
            new = self.pass_(recorder, *args)
            for name in ("flow", "align"):
                getattr(terms, name).copy_(getattr(new, name))
            for x, y in zip(terms.moments, new.moments, strict=True):
                x.copy_(y)
            self.spoil(grads, before)

        self.recording.replay = replay
        return terms

    def spoil(self, grads: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
        name = next(x for x in grads if x.startswith("predictor.") and x.endswith("bias"))
        if self.fault == "garbled" or (self.fault == "garbled later" and self.replays > 1):
            grads[name].add_(grads[name] - before[name], alpha=0.2)
        elif self.fault == "not a number":
            grads[name][3] = math.nan
        elif self.fault == "left out":
            grads[name].copy_(before[name])
        elif self.fault == "not added":
            grads[name].sub_(before[name])

    @contextlib.contextmanager
    def set_up(self) -> Iterator[mock.Mock]:
        with (
            mock.patch.object(torch.cuda, "CUDAGraph", Graph),
            mock.patch.object(torch.cuda, "graph_pool_handle"),
            mock.patch.object(torch.cuda, "default_stream"),
            mock.patch.object(torch.cuda, "graph", self.record),
            mock.patch.object(torch._C, "_cuda_endAllocateToPool"),
            mock.patch.object(torch._C, "_cuda_releasePool") as released,
            mock.patch.object(graphs.Graphs, "pass_", lambda *args: self.run(*args)),
        ):
            yield released


def recording(
    fault: str = "", choice: str = "auto", parallel: dict | None = None, rank: int | None = None
) -> dict:
    """Of an eager step and three that are to be recorded: what `gradients` gives, and what was said."""
    config = parity.small(**parallel or {}).altered(train={"cuda_graphs": choice})
    with (
        mock.patch.object(plan, "_check_machine"),
        mock.patch.object(graphs, "refusal", lambda *_: None),
        mock.patch.object(graphs, "own_stream"),
    ):
        step = parity.built(config)
    mine, step.engine.graphs = step.engine.graphs or graphs.Graphs(step.engine), None
    found, warnings, said, recorder = [gradients(step)], [], [], Recorder(fault, rank)

    def fail(*_: object) -> None:
        if recorder.recording is not None and recorder.fault == "raises":
            raise RuntimeError("out of memory")

    step.model.student.encoder.block.layers[2].register_full_backward_hook(fail)
    step.engine.graphs, mine.say = mine, said.append
    with (
        recorder.set_up() as released,
        mock.patch.object(training_step.log, "warning", lambda text, *args: warnings.append(text % args)),
    ):
        found += [gradients(step) for _ in range(3)]
    left = step.engine.graphs is not None
    assert released.call_count == (not left)
    return {
        "steps": found,
        "warnings": warnings,
        "said": said,
        "recorded": left,
        "passes": (recorder.eager, recorder.replays),
    }


STEP = parity.BATCH // parity.MICRO  # passes


def test_a_right_recording_is_kept_and_leaves_what_eager_passes_leave() -> None:
    assert graphs.WARM < STEP  # and yet nothing is recorded before all gradients are zero
    found = shared(1).run(recording)[0]
    engine, eager, *recorded = found["steps"]
    assert found["recorded"] and not found["warnings"]
    assert found["passes"] == (STEP + 1, 1 + 2 * STEP)
    (said,) = found["said"]
    assert said.endswith("largest differences: student 0.0e+00, predictor 0.0e+00, decoder 0.0e+00")
    same(eager, engine)
    for each in recorded:
        assert all(torch.equal(each[2][name], grad) for name, grad in eager[2].items())
        assert each[:2] == eager[:2]


FAULTS = {
    "raises": "RuntimeError: out of memory",
    "end": "RuntimeError: capture was invalidated",
    "garbled": "bias is off by 2.0e-01 of its norm, 1 of ",
    "garbled later": "bias is off by 2.0e-01 of its norm, 1 of ",
    "not a number": "bias is off by inf of its norm, 1 of ",
    "left out": "bias is off by 1.0e+00 of its norm, 1 of ",
    "not added": "bias is off by 1.0e+00 of its norm, 1 of ",
    "old masks": " tensors by more than 0.05",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_cannot_be_recorded_is_done_again_eagerly(fault: str) -> None:
    found = shared(1).run(recording, fault)[0]
    engine, *others = found["steps"]
    (warning,) = found["warnings"]
    assert FAULTS[fault] in warning and "--train.cuda-graphs off" in warning and not found["recorded"]
    assert ("those of an eager pass" in warning) == (fault not in ("raises", "end"))
    for each in others:
        same(each, engine)


def test_a_pass_that_is_not_finite_is_compared_with_nothing() -> None:
    """It is recorded a step later."""
    found = shared(1).run(recording, "overflow")[0]
    engine, eager, skipped, recorded = found["steps"]
    assert found["recorded"] and not found["warnings"] and len(found["said"]) == 1
    assert found["passes"] == (2 * STEP + 1, 1 + STEP)
    assert any(grad.isinf().any() for grad in skipped[2].values())
    same(eager, engine)
    same(recorded, engine)


@pytest.mark.parametrize("fault", ["end", "garbled"])
def test_tensor_ranks_go_on_in_the_same_way(fault: str) -> None:
    """The second fails, and the first leaves its recording too."""
    every = shared(2).run(recording, fault, "auto", LAYOUTS["tp2-sp"], 1)
    for reason, found in zip(("(another tensor rank failed);", FAULTS[fault]), every, strict=True):
        (warning,) = found["warnings"]
        assert reason in warning and not found["recorded"]
        for each in found["steps"][1:]:
            same(each, found["steps"][0])


def test_what_was_asked_for_and_fails_ends_the_run() -> None:
    for fault, words in (("raises", "RuntimeError: out of mem"), ("left out", ".*is off by 1.0e")):
        with pytest.raises(RankFailure, match=rf"ConfigError: train cuda_graphs on: .*\({words}"):
            shared(1).run(recording, fault, "on")
    with pytest.raises(RankFailure, match=r"rank 0(.|\n)*cuda_graphs on: .*\(another tensor rank failed\)"):
        shared(2).run(recording, "end", "on", LAYOUTS["tp2-sp"], 1)


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
