"""Checkpoints that hold roles, not layouts: saved at one split, loaded at any other.

    checkpoints/step_00000050/
        __0_0.distcp ...   tensors, through megatron-core's dist_checkpointing: weights under `student.`,
                           `predictor.`, `decoder.`; fp32 master weights, Adam's moments and the EMA under
                           `optimizer.state.<param|exp_avg|exp_avg_sq|ema>.<the same names>`
        state.json         step, samples, applied updates, the run's configuration, what the loop adds
        manifest.json      every file's size and checksum, written last

A checkpoint is written under a hidden name, flushed, then renamed: whatever happens while saving, the
previous one stays, and a folder that is visible and lists its files is whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule

from nextvid_mcore.config import RunConfig
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.training import manifest
from nextvid_mcore.training.manifest import CheckpointError
from nextvid_mcore.training.optimizer import STUDENT, RoleOptimizers
from nextvid_mcore.training.saving import STATE, Saver, sharded_state, visible, weight_tensors
from nextvid_mcore.training.shards import STATE_PREFIX
from nextvid_mcore.training.together import together

log = logging.getLogger(__name__)
_HOW = ("backend", "compile")  # what computes the same, as FP8 does, which is no part of the model
# what tensors depend on
_SHAPES = ("encoder", "predictor", "decoder", "patch_size", "tubelet_size", "context", "condition")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: finished steps, samples drawn, and what the loop keeps (bad files, ...)."""

    step: int
    samples: int
    extra: dict[str, Any]


def save(
    folder: Path | str,
    step: int,
    samples: int,
    config: RunConfig,
    optimizers: RoleOptimizers,
    extra: dict[str, Any] | None = None,
    keep: int = 0,
    asynchronous: bool = False,
) -> Path:
    """Save a run after `step` steps and wait for it; training/saving.py. Every rank calls it.

    Returns:
        The checkpoint's folder. One of the same step that is whole is left as it is.
    """
    saver = Saver(folder, config, optimizers, keep, asynchronous)
    saver.begin(step, samples, extra)
    saver.wait()
    assert saver.newest is not None
    return saver.newest


def latest(folder: Path | str) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Partial and damaged ones are named and passed over.

    Where processes run together, every rank calls it and gets rank 0's answer.
    """
    found: list[Path | None] = [None]
    joined = dist.is_initialized() and dist.get_world_size() > 1
    if not joined or dist.get_rank() == 0:
        for path in reversed(visible(Path(folder))):
            try:
                manifest.read_manifest(path)
                found[0] = path
                break
            except CheckpointError as error:
                log.warning("passing over a checkpoint: %s", error)
    if joined:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def resumable(folder: Path | str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that passes every check, and what was passed over and why.

    Reads every byte of it, shared out over the ranks; all ranks call it.
    """
    names = [[path.name for path in reversed(visible(Path(folder)))] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, src=0)
    notes = []
    for name in names[0]:
        path = Path(folder).absolute() / name
        try:
            verify(path)
            return path, notes
        except CheckpointError as error:
            notes.append(f"passing over a checkpoint: {error}")
    return None, notes


def read_state(path: Path | str) -> dict[str, Any]:
    """A checkpoint's state.json: step, samples, updates, config, layout, versions, extra."""
    path = Path(path)
    manifest.read_manifest(path)
    try:
        state = json.loads((path / STATE).read_text())
        int(state["step"]), int(state["samples"]), int(state["updates"]), dict(state["config"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE} can't be read ({error!r})") from None
    return state


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values by dotted name: stages.0.batch."""
    if isinstance(value, list):
        value = {str(i): each for i, each in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    parts = (flat(each, f"{name}.{key}" if name else key) for key, each in value.items())
    return {key: each for part in parts for key, each in part.items()}


def completed(saved: dict[str, Any], like: Any) -> dict[str, Any]:
    """The saved fields of a configuration like `like`; one that was added since has its default."""
    found = dict(saved)
    for field in dataclasses.fields(like):
        here = getattr(like, field.name)
        if field.name in saved:
            there = saved[field.name]
            if isinstance(here, tuple) and here and dataclasses.is_dataclass(here[0]):
                found[field.name] = [completed(each, here[0]) for each in there]
            else:
                found[field.name] = completed(there, here) if dataclasses.is_dataclass(here) else there
        elif field.default is not dataclasses.MISSING:
            value = field.default
            found[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(found))


def check_model(path: Path | str, config: RunConfig, weights_only: bool = False) -> None:
    """Raise CheckpointError naming the fields in which the checkpoint's model differs from `config`.

    A field that is newer than the checkpoint had its default there.
    weights_only: compare what the tensors' shapes depend on, not what the model does with them.
    """
    there = read_state(path)["config"]
    here = json.loads(json.dumps(dataclasses.asdict(config)))
    saved = completed(there["model"], config.model)
    pairs = [(name, saved.get(name), here["model"][name]) for name in here["model"]]
    # the decoder, or the alignment's head, may be left behind; one that isn't there can't be taken
    missing = {name for name in ("generate", "align") if here["model"][name] and not saved[name]}
    needed = missing.union(_SHAPES)
    pairs = [(f"model.{n}", a, b) for n, a, b in pairs if n not in _HOW and (not weights_only or n in needed)]
    pairs.append(("target.kind", there.get("target", {}).get("kind"), here["target"]["kind"]))
    differ = []
    for name, a, b in pairs:
        old, new = flat(a, name), flat(b, name)
        differ += [f"{k} is {old.get(k)} there and {new.get(k)} here" for k in new if old.get(k) != new[k]]
    if differ:
        way = "set it as it was" if weights_only else "set it as it was, or start a new run in another --out"
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(differ)}; {way}")


def verify(path: Path | str) -> None:
    """Check every file against the manifest, shared out over the ranks, and the pickles.

    Every rank calls it.
    """
    path = Path(path)

    def check() -> None:
        files = manifest.read_manifest(path)
        manifest.check_content(path, files, dist.get_rank(), dist.get_world_size())
        manifest.check_pickles(path, files)

    together(f"checking {path}", check)


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    return together(f"loading {path}", lambda: dist_checkpointing.load(state, str(path)))


def _put(module: MegatronModule, loaded: dict[str, Any], prefix: str) -> None:
    """Give loaded weights to a module; nothing may be missing but Transformer Engine's extra state."""
    result = module.load_state_dict({n.removeprefix(prefix): t for n, t in loaded.items()}, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{prefix}: missing {missing[:3]}, unknown {result.unexpected_keys[:3]}")


def load(
    path: Path | str,
    config: RunConfig,
    optimizers: RoleOptimizers,
    weights_only: bool = False,
    verified: bool = False,
) -> Progress:
    """Continue from a checkpoint, in any layout: weights, master weights, moments, EMA, reference.

    Args:
        verified: `resumable` has just read it.
        weights_only: take the weights and their EMA for a new run: moments zero, step 0, no samples.
    """
    path = Path(path).absolute()
    together(f"loading {path}", lambda: check_model(path, config, weights_only))
    if not verified:
        verify(path)
    state = read_state(path)
    loaded = _read(path, sharded_state(optimizers, loading=True))
    for role, module in optimizers.modules.items():
        _put(module, loaded[f"model.{role}"], f"{role}.")
        optimizers.optimizers[role].load_tensors(loaded[f"optimizer.{role}"])
    optimizers.set_updates(int(state["updates"]))
    if weights_only:
        optimizers.forget_moments()
    optimizers.refresh()
    if weights_only:
        return Progress(0, 0, {})
    return Progress(int(state["step"]), int(state["samples"]), dict(state["extra"]))


def load_weights(
    path: Path | str,
    modules: dict[str, MegatronModule],
    groups: RoleGroups,
    which: Literal["online", "ema"] = "online",
) -> dict[str, Any]:
    """Load weights alone, in any layout, one process included.

    Args:
        modules: module by the name it has in the checkpoint: "student.encoder", "predictor", "decoder", ...
        groups: the groups the modules were built with.
        which: "ema": the student's fp32 average; predictor and decoder have none and are loaded as they are.

    Returns:
        The checkpoint's state.json.
    """
    path = Path(path).absolute()
    verify(path)
    state = {}
    for name, module in modules.items():
        entries = weight_tensors(module, f"{name}.", groups)
        if which == "ema" and name.split(".")[0] == STUDENT:
            entries = {n: replace(e, key=f"{STATE_PREFIX}.ema.{e.key}") for n, e in entries.items()}
        state[name] = entries
    loaded = _read(path, state)
    for name, module in modules.items():
        _put(module, loaded[name], f"{name}.")
    return read_state(path)
