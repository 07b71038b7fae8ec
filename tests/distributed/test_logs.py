"""What a run writes about itself: profiles of chosen steps, and what every module runs on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from launch import shared
from test_pretrain import data, pretrain, rows, words  # noqa: F401  (`data` is a fixture)

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, ProfileConfig
from nextvid_mcore.schedule import Schedule

# ruff: noqa: F811


def table(path: Path) -> dict[str, str]:
    """Lines by their first word."""
    return {line.split()[0]: line for line in path.read_text().splitlines()}


def test_profiles_and_modules_of_every_rank(data: Path, tmp_path: Path):
    out, plain = tmp_path / "run", tmp_path / "plain"
    split = "--parallel.encoder.pipeline 2 --train.steps 4"
    starts = [words(data, out, f"{split} --profile.steps 2-3"), words(data, plain, split)]
    assert shared(2).run(pretrain, starts, timeout=300) == [[0, 0]] * 2
    assert rows(out / "metrics.jsonl") == rows(plain / "metrics.jsonl")
    assert not (plain / "profile").exists()
    found = sorted(path.name for path in (out / "profile").iterdir())
    assert found == [f"steps_2-3_rank{rank}.json.gz" for rank in (0, 1)]
    for name in found:
        with gzip.open(out / "profile" / name) as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"step 2", "step 3"} <= names and not names & {"step 1", "step 4"}
        assert "aten::linear" in names or "aten::addmm" in names or "aten::mm" in names

    first, last = (table(out / "modules" / f"rank{rank}.txt") for rank in (0, 1))
    assert first.keys() == {"module", "student", "reference"}
    assert last.keys() == {"module", "student", "reference", "predictor", "decoder"}
    for line in [*first.values(), *last.values()][1:]:
        if not line.startswith("module"):
            assert "float32" in line and "megatron-core" in line and "PatternAttention" in line
            assert "sdpa " in line and " tokens, 4 heads of " in line and "has not run" not in line
    assert "masked" in last["predictor"] and "masked" not in last["decoder"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("ten", "given as 10-12 or 10, got 'ten'"),
        ("1-2-3", "given as 10-12 or 10"),
        ("5-4", "first to last, got '5-4'"),
        ("0-4", "from 1 up"),
    ],
)
def test_profile_steps_that_cannot_be(steps: str, message: str):
    with pytest.raises(ConfigError, match=message):
        ProfileConfig(steps)


@pytest.mark.parametrize(
    ("train", "steps", "first", "last"),
    [
        ({}, "120-121", 1, 120),
        ({"steps": 3}, "3-4", 1, 3),
        ({"start_stage": "cooldown"}, "100-102", 101, 120),
        ({"start_stage": "cooldown", "steps": 4}, "104-105", 101, 104),
    ],
)
def test_profile_steps_that_the_run_does_not_take(train: dict, steps: str, first: int, last: int):
    config = recipes.get("tiny").altered(train=train, profile={"steps": steps})
    with pytest.raises(ConfigError, match=f"profile steps {steps}: this run takes steps {first} to {last};"):
        Schedule(config)
    Schedule(config.altered(profile={"steps": f"{first}-{last}"}))
