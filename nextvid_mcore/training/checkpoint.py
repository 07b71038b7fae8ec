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
import importlib.metadata
import json
import logging
import queue
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from nextvid_mcore.config import RunConfig
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.training import manifest
from nextvid_mcore.training.manifest import CheckpointError
from nextvid_mcore.training.optimizer import STUDENT, RoleOptimizers
from nextvid_mcore.training.shards import STATE_PREFIX

log = logging.getLogger(__name__)
# It warns of asynchronous saving, now deprecated, on every synchronous save.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)

STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")
# what tensors depend on
_SHAPES = ("encoder", "predictor", "decoder", "patch_size", "tubelet_size", "context", "condition")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: finished steps, samples drawn, and what the loop keeps (bad files, ...)."""

    step: int
    samples: int
    extra: dict[str, Any]


def _together(what: str, action: Callable[[], Any]) -> Any:
    """Run `action` on every rank; if it failed on any, raise CheckpointError on all."""
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:  # torch's is not an Exception
        error = caught
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else _reason(error))
    failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        rank, reason = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {reason}") from error
    return result


def _reason(error: BaseException) -> str:
    """One line; of a failed write, what the ranks that failed said."""
    if isinstance(error, CheckpointException):
        told = [str(exception) for exception, _ in error.failures.values()]
        return "; ".join(told) or "the tensors could not be written"
    return str(error) if isinstance(error, CheckpointError) else repr(error).splitlines()[0]


def _tensors(module: MegatronModule, prefix: str, groups: RoleGroups) -> dict[str, ShardedTensor]:
    """Sharded tensors of a module's weights by state-dict name, keys starting with `prefix`.

    Transformer Engine's `_extra_state` (FP8 scales, rebuilt in a few steps) is left out: it is a pickle.
    """
    state = module.sharded_state_dict(
        prefix=prefix, metadata={"dp_cp_group": groups.collection.dp_cp, "singleton_local_shards": False}
    )
    return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def _state(optimizers: RoleOptimizers, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for role, module in optimizers.modules.items():
        weights = _tensors(module, f"{role}.", optimizers.groups)
        state[f"model.{role}"] = weights
        state[f"optimizer.{role}"] = optimizers.optimizers[role].sharded_tensors(weights, loading)
    return state


def _require_space(folder: Path, state: dict[str, Any]) -> None:
    """Fail before the first byte if the disk is too full."""
    mine = sum(
        entry.data.numel() * entry.data.element_size()
        for entry in nested_values(state)
        if is_main_replica(entry.replica_id)
    )
    total = torch.tensor([mine], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    needed, free = int(total.item() * 1.02) + 2**20, shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"a checkpoint needs {needed / 1e9:.3f} GB but {free / 1e9:.3f} GB are free in {folder}; "
            f"make room or keep fewer checkpoints"
        )


def save(
    folder: Path | str,
    step: int,
    samples: int,
    config: RunConfig,
    optimizers: RoleOptimizers,
    extra: dict[str, Any] | None = None,
    keep: int = 0,
) -> Path:
    """Save a run after `step` steps. Every rank calls it.

    Args:
        folder: the run's checkpoints.
        step: finished steps.
        samples: samples drawn so far.
        extra: further state of the loop, plain JSON values.
        keep: newest checkpoints that stay; older ones are deleted once this one is whole. 0: all.

    Returns:
        The checkpoint's folder. One of the same step that is whole is left as it is.
    """
    root, rank = Path(folder).absolute(), dist.get_rank()
    final, partial = root / f"step_{step:08d}", root / f".step_{step:08d}.partial"
    what = f"saving {final}"

    def prepare() -> bool:
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".step_*"):
                shutil.rmtree(leftover)
            if final.exists():
                try:
                    manifest.read_manifest(final)
                    return True
                except CheckpointError:
                    shutil.rmtree(final)  # a damaged one of the same step
            partial.mkdir()
        return False

    there = [_together(what, prepare)]
    dist.broadcast_object_list(there, src=0)
    if there[0]:
        return final

    def write() -> None:
        optimizers.gather_weights()
        state = _state(optimizers, loading=False)
        _require_space(root, state)
        # A plain queue: the writer runs in this process, and megatron-core's own spawns a manager process.
        filesystem_async._results_queue = queue.Queue()
        try:
            dist_checkpointing.save(state, str(partial))
        except CheckpointException as error:
            free = shutil.disk_usage(root).free / 1e9
            raise CheckpointError(f"{_reason(error)} ({free:.3f} GB are free in {root})") from error

    def describe() -> dict[str, Any]:
        mine = [path for path in partial.iterdir() if path.name.startswith(f"__{rank}_")]
        if rank == 0:
            content = {
                "step": step,
                "samples": samples,
                "updates": optimizers.updates,
                "config": dataclasses.asdict(config),
                "layout": dataclasses.asdict(optimizers.groups.layout),
                "versions": {p: importlib.metadata.version(p) for p in ("torch", "megatron-core")},
                "extra": extra or {},
            }
            manifest.write_json(partial / STATE, content)
            others = [path for path in partial.iterdir() if not path.name.startswith("__")]
            for path in others:
                manifest.sync(path)
            mine += others
        return {path.name: manifest.fingerprint(path) for path in mine}

    def publish(files: dict[str, Any]) -> None:
        if rank == 0:
            manifest.write_json(partial / manifest.MANIFEST, files)
            manifest.sync(partial)
            partial.rename(final)
            manifest.sync(root)
            _delete_old(root, final, keep)

    try:
        _together(what, write)
        described: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(described, _together(what, describe))
        _together(what, lambda: publish({n: f for d in described for n, f in d.items()}))
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _all(root: Path) -> list[Path]:
    """Visible checkpoints, oldest first, whole or not."""
    found = [p for p in root.glob("step_*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _delete_old(root: Path, newest: Path, keep: int) -> None:
    if not keep:
        return
    for old in _all(root)[:-keep]:
        if old != newest:
            hidden = root / f".{old.name}.deleted"  # never half a checkpoint under a visible name
            old.rename(hidden)
            shutil.rmtree(hidden)


def latest(folder: Path | str) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Partial and damaged ones are named and passed over.

    Where processes run together, every rank calls it and gets rank 0's answer.
    """
    found: list[Path | None] = [None]
    joined = dist.is_initialized() and dist.get_world_size() > 1
    if not joined or dist.get_rank() == 0:
        for path in reversed(_all(Path(folder))):
            try:
                manifest.read_manifest(path)
                found[0] = path
                break
            except CheckpointError as error:
                log.warning("passing over a checkpoint: %s", error)
    if joined:
        dist.broadcast_object_list(found, src=0)
    return found[0]


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


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in _flat(f"{prefix}.{name}", inner).items()}


def check_model(path: Path | str, config: RunConfig, weights_only: bool = False) -> None:
    """Raise CheckpointError naming the fields in which the checkpoint's model differs from `config`.

    weights_only: compare what the tensors' shapes depend on, not what the model does with them.
    """
    there = read_state(path)["config"]
    here = json.loads(json.dumps(dataclasses.asdict(config)))
    pairs = [(name, there["model"].get(name), here["model"][name]) for name in here["model"]]
    pairs = [
        (f"model.{n}", a, b) for n, a, b in pairs if n != "backend" and (not weights_only or n in _SHAPES)
    ]
    pairs.append(("target.kind", there.get("target", {}).get("kind"), here["target"]["kind"]))
    differ = []
    for name, a, b in pairs:
        old, new = _flat(name, a), _flat(name, b)
        differ += [f"{k} is {old.get(k)} there and {new.get(k)} here" for k in new if old.get(k) != new[k]]
    if differ:
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(differ)}")


def verify(path: Path | str) -> None:
    """Check every file against the manifest, shared out over the ranks, and the pickles.

    Every rank calls it.
    """
    path = Path(path)

    def check() -> None:
        files = manifest.read_manifest(path)
        manifest.check_content(path, files, dist.get_rank(), dist.get_world_size())
        manifest.check_pickles(path, files)

    _together(f"checking {path}", check)


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    return _together(f"loading {path}", lambda: dist_checkpointing.load(state, str(path)))


def _put(module: MegatronModule, loaded: dict[str, Any], prefix: str) -> None:
    """Give loaded weights to a module; nothing may be missing but Transformer Engine's extra state."""
    result = module.load_state_dict({n.removeprefix(prefix): t for n, t in loaded.items()}, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{prefix}: missing {missing[:3]}, unknown {result.unexpected_keys[:3]}")


def load(
    path: Path | str, config: RunConfig, optimizers: RoleOptimizers, weights_only: bool = False
) -> Progress:
    """Continue from a checkpoint, in any layout: weights, master weights, moments, EMA, reference.

    Args:
        weights_only: take the weights and their EMA for a new run: moments zero, step 0, no samples.
    """
    path = Path(path).absolute()
    _together(f"loading {path}", lambda: check_model(path, config, weights_only))
    verify(path)
    state = read_state(path)
    loaded = _read(path, _state(optimizers, loading=True))
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
        entries = _tensors(module, f"{name}.", groups)
        if which == "ema" and name.split(".")[0] == STUDENT:
            entries = {n: replace(e, key=f"{STATE_PREFIX}.ema.{e.key}") for n, e in entries.items()}
        state[name] = entries
    loaded = _read(path, state)
    for name, module in modules.items():
        _put(module, loaded[name], f"{name}.")
    return read_state(path)
