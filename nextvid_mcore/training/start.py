"""Where a run starts from, and what this start sets otherwise than the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nextvid_mcore.config import RunConfig, require
from nextvid_mcore.training import checkpoint


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


def find_checkpoint(source: Path) -> Path:
    """`--init-from`: a checkpoint, a run's checkpoints folder, or a run."""
    if (source / checkpoint.STATE).exists():
        return source
    for folder in (source / "checkpoints", source):
        found = checkpoint.latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    require(False, f"--init-from {source}: there is no whole checkpoint")
    raise AssertionError
