"""schedule.py: Table 8's end points and boundaries, exact sample counts, and where a run begins and ends."""

from dataclasses import replace

import pytest

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, StageConfig, TrainConfig
from nextvid_mcore.schedule import Schedule

PAPER = recipes.get("vit_g")
TINY = recipes.get("tiny")

# Table 8: name, first step, last step, frames, batch, start LR, final LR, flow LR, tau samples
TABLE_8 = [
    ("warmup", 0, 11_999, 16, 3072, 1e-4, 5e-4, None, 4),
    ("stable1", 12_000, 39_999, 16, 3072, 5e-4, 4.5e-4, None, 4),
    ("stable2", 40_000, 119_999, 16, 3072, 4.5e-4, 1e-4, 8e-4, 1),
    ("cooldown", 120_000, 131_999, 64, 768, 1e-4, 1e-6, 3e-4, 1),
]


def run(config, **train):
    return replace(config, train=replace(config.train, **train))


@pytest.mark.parametrize("row", TABLE_8, ids=[row[0] for row in TABLE_8])
def test_table_8(row):
    name, first, last, frames, batch, start, final, flow, tau = row
    schedule = Schedule(PAPER)
    assert schedule.first_step(name) == first
    for step, lr in ((first, start), (last, final)):
        point = schedule.at(step)
        assert point.lr == lr  # exactly
        assert point.lr_flow == (lr if flow is None else flow)
        assert (point.stage.name, point.step) == (name, step)
        assert (point.stage.frames, point.batch, point.stage.tau_samples) == (frames, batch, tau)


def test_learning_rate_is_a_straight_line_in_between():
    schedule = Schedule(PAPER)
    for _, first, last, _, _, start, final, _, _ in TABLE_8:
        rates = [schedule.at(first + (last - first) * k // 4).lr for k in range(5)]
        for k, rate in enumerate(rates):
            assert rate == pytest.approx(start + (final - start) * k / 4, rel=1e-3)
        step = schedule.at(first + 1).lr - schedule.at(first).lr
        assert step == pytest.approx((final - start) / (last - first), rel=1e-9)


def test_the_papers_samples():
    """377.9M clips and 830.5B tokens: stage 4's batch is 768."""
    schedule = Schedule(PAPER)
    assert schedule.schedule_steps == schedule.total_steps == 132_000
    assert schedule.samples_before(132_000) == 377_856_000
    assert schedule.samples_before(120_000) == 368_640_000
    assert schedule.samples_before(120_001) == 368_640_768
    tokens = sum(
        stage.steps * stage.batch * 256 * PAPER.model.token_frames(stage.frames) for stage in PAPER.stages
    )
    assert tokens / 1e9 == pytest.approx(830.5, abs=0.05)


def test_sample_indices_have_no_gap_and_no_overlap():
    schedule, seen = Schedule(TINY), 0
    for step in range(schedule.total_steps):
        point = schedule.at(step)
        assert point.samples_before == schedule.samples_before(step) == seen
        seen += point.batch
    assert schedule.samples_before(schedule.total_steps) == seen == 100 * 8 + 20 * 4


def test_global_batch_overrides_every_stage():
    schedule = Schedule(run(TINY, global_batch=6))
    assert {schedule.at(step).batch for step in range(120)} == {6}
    assert schedule.samples_before(55) == 330


def test_train_steps_stops_and_never_rescales():
    whole, short = Schedule(TINY), Schedule(run(TINY, steps=25))
    assert short.total_steps == 25 and short.schedule_steps == 120
    assert [short.at(step) for step in range(25)] == [whole.at(step) for step in range(25)]
    assert Schedule(run(TINY, steps=120)).total_steps == 120
    with pytest.raises(ConfigError, match="--train.steps 121 is more than the 120 steps"):
        Schedule(run(TINY, steps=121))


def test_start_stage_begins_there_and_counts_from_the_whole_schedule():
    whole, branch = Schedule(TINY), Schedule(run(TINY, start_stage="cooldown"))
    assert (whole.first_step_of_run, branch.first_step_of_run, branch.total_steps) == (0, 100, 120)
    assert branch.at(100) == whole.at(100)
    assert branch.at(100).samples_before == 800
    assert Schedule(run(TINY, start_stage="cooldown", steps=4)).total_steps == 104
    with pytest.raises(ConfigError, match="steps 21 is more than the 20 steps .* from stage cooldown on"):
        Schedule(run(TINY, start_stage="cooldown", steps=21))


@pytest.mark.parametrize(
    "train, taken",
    [
        ({}, {"warmup": 20, "stable1": 40, "stable2": 40, "cooldown": 20}),
        ({"steps": 70}, {"warmup": 20, "stable1": 40, "stable2": 10}),
        ({"steps": 60}, {"warmup": 20, "stable1": 40}),
        ({"start_stage": "stable2", "steps": 45}, {"stable2": 40, "cooldown": 5}),
    ],
)
def test_stages_of_a_run_have_the_steps_that_it_takes(train, taken):
    schedule = Schedule(run(TINY, **train))
    assert {stage.name: stage.steps for stage in schedule.stages_of_run()} == taken
    seen = [schedule.at(step).stage.name for step in range(schedule.first_step_of_run, schedule.total_steps)]
    assert {name: seen.count(name) for name in dict.fromkeys(seen)} == taken


def test_unknown_stage_lists_what_there_is():
    with pytest.raises(ConfigError, match="'decay'.*warmup, stable1, stable2, cooldown"):
        Schedule(run(TINY, start_stage="decay"))


def test_steps_outside_the_schedule_are_refused():
    schedule = Schedule(TINY)
    for step in (120, -1):
        with pytest.raises(ConfigError, match=f"step {step} lies outside .* 0 to 119"):
            schedule.at(step)
    with pytest.raises(ConfigError, match="121 finished steps: the schedule has 120"):
        schedule.samples_before(121)


def test_a_stage_of_one_step():
    stages = (StageConfig("a", 1, 8, 2, 1e-3, 1e-4), StageConfig("b", 2, 8, 3, 1e-4, 1e-5))
    schedule = Schedule(replace(TINY, stages=stages, train=TrainConfig()))
    assert [schedule.at(step).lr for step in range(3)] == [1e-3, 1e-4, 1e-5]
    assert [schedule.samples_before(step) for step in range(4)] == [0, 2, 5, 8]


@pytest.mark.parametrize(
    "train, taken, others",
    [
        ({"steps": 25}, ("1", "25", "1-25"), ("26", "25-26")),
        ({"start_stage": "cooldown"}, ("101-120",), ("100",)),
    ],
)
def test_profiled_steps_are_steps_that_the_run_takes(train, taken, others):
    config = run(TINY, **train)
    for steps in taken:
        Schedule(config.altered(profile={"steps": steps}))
    for steps in others:
        with pytest.raises(ConfigError, match=f"profile steps {steps}: this run takes steps"):
            Schedule(config.altered(profile={"steps": steps}))
