"""Where a run starts from, and what this start sets otherwise than the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nextvid_mcore.config import RunConfig, require
from nextvid_mcore.training import checkpoint


def changes(old: dict[str, Any], config: RunConfig) -> list[str]:
    """What this start sets otherwise than the checkpoint's run, a line each; how it is logged aside."""
    quiet = ("checkpoint.", "eval.", "wandb.", "profile.", "parallel.timeout")
    quiet += ("train.steps", "train.log_every", "train.progress")

    def flat(value: Any, name: str = "") -> dict[str, Any]:
        if isinstance(value, list):
            value = {str(i): each for i, each in enumerate(value)}
        if not isinstance(value, dict):
            return {name: value}
        parts = (flat(each, f"{name}.{key}" if name else key) for key, each in value.items())
        return {key: each for part in parts for key, each in part.items()}

    then, now = flat(old), flat(json.loads(config.to_json()))
    names = [name for name in sorted(then.keys() | now.keys()) if not name.startswith(quiet)]
    return [
        f"note: {name} was {then.get(name)} and is now {now.get(name)}"
        for name in names
        if then.get(name) != now.get(name)
    ]


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
