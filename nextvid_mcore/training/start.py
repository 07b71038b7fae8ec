"""Where a run starts from, and what this start sets otherwise than the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nextvid_mcore.config import RunConfig, require
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.training import checkpoint

CHECKPOINTS = "checkpoints"  # of a run's folder


def going_on(state: dict[str, Any], config: RunConfig, out: Path) -> tuple[RunConfig, list[str]]:
    """The run as it goes on from a checkpoint of this state.json, and what is to be said first.

    It began at the stage that it began at, whether this start says so again or not: `train.steps` counts from
    there. ConfigError where it can't go on.
    """
    check_start_stage(state["config"], config, out)
    config = config.altered(train={"start_stage": state["config"]["train"].get("start_stage")})
    step, schedule = int(state["step"]), Schedule(config)
    check_length(step, schedule, out)
    return config, changes(state["config"], config) + samples_notes(step, int(state["samples"]), schedule)


def changes(old: dict[str, Any], config: RunConfig) -> list[str]:
    """What this start sets otherwise than the checkpoint's run, a line each; how it is logged aside.

    A setting that is newer than the checkpoint had its default there.
    """
    quiet = ("checkpoint.", "eval.", "wandb.", "profile.", "parallel.timeout")
    quiet += ("train.steps", "train.log_every", "train.progress")
    then = checkpoint.flat(_in_force(checkpoint.completed(old, config)))
    now = checkpoint.flat(_in_force(json.loads(config.to_json())))
    notes = []
    for name in sorted(then.keys() | now.keys()):
        if name.startswith(quiet) or (name in then and name in now and then[name] == now[name]):
            continue
        if name == "train.init_from":
            if now[name] is not None:
                notes.append("note: --init-from is not read: the run goes on from its own checkpoint")
        elif name not in now:
            notes.append(f"note: {name} was {_said(then[name])} and is gone")
        else:
            was = f"was {_said(then[name])} and" if name in then else "wasn't there and"
            notes.append(f"note: {name} {was} is now {_said(now[name])}")
    return notes


def check_start_stage(old: dict[str, Any], config: RunConfig, out: Path) -> None:
    """ConfigError where a run that goes on is told to begin elsewhere: it would not."""
    asked, began = config.train.start_stage, old["train"].get("start_stage")
    require(
        asked in (None, began),
        f"--start-stage {asked}: {out} holds a run that began at "
        f"{'its first stage' if began is None else f'stage {began}'} and goes on from its own checkpoint; "
        f"leave it out, or branch into another --out with --init-from {out}",
    )


def check_length(step: int, schedule: Schedule, out: Path) -> None:
    """ConfigError where by this start's settings the run is past its end: nothing would be trained."""
    require(
        step <= schedule.schedule_steps,
        f"{out} holds a run of {step:,} steps, and the stages of this start have "
        f"{schedule.schedule_steps:,}: nothing is left to train; give them more steps, or name another --out",
    )


def samples_notes(step: int, samples: int, schedule: Schedule) -> list[str]:
    """What is to be said where batches or stages have changed, and with them which samples come next."""
    now = schedule.samples_before(step)
    if now == samples:
        return []
    what = f"{samples - now:,} are drawn again" if now < samples else f"{now - samples:,} are left out"
    return [
        f"note: {samples:,} samples were drawn; by this start's settings it goes on at {now:,}, so {what}"
    ]


def _said(value: Any) -> Any:
    return "not set" if value is None else value


def _in_force(config: dict[str, Any]) -> dict[str, Any]:
    """With every stage's batches as they are, whichever setting says it."""
    train, stages = dict(config["train"]), []
    batch, micro = train.pop("global_batch", None), train.pop("micro_batch", None)
    for stage in config["stages"]:
        most = stage.get("max_micro_batch", 1)
        own = {"batch": batch or stage["batch"], "micro_batch": micro or stage.get("micro_batch") or most}
        stages.append({k: v for k, v in stage.items() if k != "max_micro_batch"} | own)
    return config | {"train": train, "stages": stages}


def check_init_from(config: RunConfig, out: Path) -> None:
    """ConfigError, before anything is built, where a run that begins in `out` finds nothing to begin from."""
    if config.train.init_from is not None and checkpoint.latest(out / CHECKPOINTS) is None:
        find_checkpoint(Path(config.train.init_from))


def find_checkpoint(source: Path) -> Path:
    """`--init-from`: a checkpoint, a run's checkpoints folder, or a run."""
    if (source / checkpoint.STATE).exists():
        return source
    for folder in (source / CHECKPOINTS, source):
        found = checkpoint.latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    said = "there is no whole checkpoint" if source.exists() else "no such folder; give a run or a checkpoint"
    if (source / "model.safetensors").exists():
        said = "this is an export, which holds no optimizer; give the run or the checkpoint it was made of"
    require(False, f"--init-from {source}: {said}")
    raise AssertionError
