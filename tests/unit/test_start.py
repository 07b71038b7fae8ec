"""What a start sets otherwise than the checkpoint it goes on from is said, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextvid_mcore import cli, pretrain, recipes
from nextvid_mcore.config import ConfigError, RoleParallel, RunConfig
from nextvid_mcore.parallel.placement import settled
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.training import checkpoint, loop
from nextvid_mcore.training.start import (
    changes,
    check_init_from,
    check_length,
    check_start_stage,
    find_checkpoint,
    going_on,
    samples_notes,
)


def saved(config: RunConfig, micro: int | None = None) -> dict:
    """As a checkpoint has it; with `micro` as it was when that was one number in `train`."""
    there = json.loads(config.to_json())
    if micro is not None:
        there["train"]["micro_batch"] = micro
        for stage in there["stages"]:
            del stage["micro_batch"], stage["max_micro_batch"]
        there["data"]["former"] = 3
        del there["fp8"]["fused"], there["model"]["compile"], there["profile"]
    return there


def test_a_run_that_goes_on_as_it_was_says_nothing() -> None:
    config = settled(recipes.get("vit_g"), 96)[0]
    assert changes(saved(config), config) == []
    assert changes(saved(recipes.get("vit_g")), config) == []
    every = settled(recipes.get("vit_g").altered(train={"micro_batch": 4}), 96)[0]
    former = ["note: data.former was 3 and is gone"]
    assert changes(saved(every, micro=4), every) == former
    assert changes(saved(every, micro=4), every.altered(train={"micro_batch": None})) == former
    whole = every.altered(train={"global_batch": 3072}, stages=every.stages[:3])
    assert changes(saved(whole), whole.altered(train={"global_batch": None})) == []


def test_what_differs_is_said_as_it_is() -> None:
    config = settled(recipes.get("vit_g"), 96)[0]
    found = changes(saved(config, micro=4), config)
    assert found == [
        "note: data.former was 3 and is gone",
        "note: stages.0.micro_batch was 4 and is now 8",
        "note: stages.1.micro_batch was 4 and is now 8",
        "note: stages.2.micro_batch was 4 and is now 16",
    ]
    other = config.altered(fp8={"fused": False}, stages=config.stages[:3], data={"sets": ()})
    found = changes(saved(config), other)
    assert "note: fp8.fused was True and is now False" in found
    assert "note: stages.3.name was cooldown and is gone" in found
    assert "note: data.sets.0.name was imagenet and is gone" in found
    assert "note: stages.3.name wasn't there and is now cooldown" in changes(saved(other), config)
    split = config.altered(parallel={"encoder": RoleParallel(tensor=2)}, train={"init_from": "runs/other"})
    assert changes(saved(config), split) == [
        "note: parallel.encoder.tensor was not set and is now 2",
        "note: --init-from is not read: the run goes on from its own checkpoint",
    ]
    assert changes(saved(config), config.altered(train={"log_every": 5}, eval={"every": 3})) == []
    branched = saved(config.altered(train={"init_from": "runs/other"}))
    assert changes(branched, config) == []  # left out this time: nothing was asked for


def test_a_branch_needs_a_folder_of_its_own() -> None:
    whole = recipes.get("tiny")
    branch = whole.altered(train={"start_stage": "cooldown"})
    for old, new in ((whole, whole), (branch, branch), (branch, whole)):
        check_start_stage(saved(old), new, Path("runs/a"))
    with pytest.raises(
        ConfigError, match="--start-stage cooldown: runs/a holds a run that began at its first"
    ):
        check_start_stage(saved(whole), branch, Path("runs/a"))


def test_a_branch_goes_on_as_one_whether_it_is_said_again_or_not() -> None:
    branch = recipes.get("tiny").altered(train={"start_stage": "cooldown", "steps": 4})
    state = {"step": 102, "samples": 808, "config": saved(branch)}
    for again in (branch, branch.altered(train={"start_stage": None})):
        assert going_on(state, again, Path("runs/a")) == (branch, [])


def test_other_batches_draw_other_samples_and_it_is_said() -> None:
    config = recipes.get("tiny")
    same, half = Schedule(config), Schedule(config.altered(train={"global_batch": 4}))
    double = Schedule(config.altered(train={"global_batch": 16}))
    assert samples_notes(12, 96, same) == []
    said = "note: 96 samples were drawn; by this start's settings it goes on at"
    assert samples_notes(12, 96, half) == [f"{said} 48, so 48 are drawn again"]
    assert samples_notes(12, 96, double) == [f"{said} 192, so 96 are left out"]


def test_stages_shorter_than_what_was_trained_are_refused() -> None:
    config = recipes.get("tiny")
    short = Schedule(config.altered(stages=config.stages[:1]))
    check_length(20, short, Path("runs/a"))
    check_length(40, Schedule(config.altered(train={"steps": 30})), Path("runs/a"))  # it has stopped
    with pytest.raises(
        ConfigError, match="runs/a holds a run of 21 steps, and the stages of this start have 20"
    ):
        check_length(21, short, Path("runs/a"))


def test_an_export_is_no_beginning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init-from .*: there is no whole checkpoint$"):
        find_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="--init-from .*/none: no such folder; give a run or a checkpoint$"):
        find_checkpoint(tmp_path / "none")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="this is an export, which holds no optimizer; give the run or"):
        find_checkpoint(tmp_path)


def test_where_a_run_begins_is_looked_up_before_anything_is_built(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    def built(config: RunConfig, out: Path) -> None:
        raise AssertionError("the networks were built")

    monkeypatch.setattr(loop, "Trainer", built)
    config = recipes.get("tiny").altered(train={"init_from": str(tmp_path / "none")})
    with pytest.raises(SystemExit) as ended:
        pretrain.train(config, cli.Options(tmp_path / "new", dry_run=False, world_size=1))
    assert ended.value.code == 2 and "no such folder; give a run" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "latest", lambda folder: folder / "step_00000004")
    check_init_from(config, tmp_path / "goes on")  # from its own checkpoint: --init-from is not read
