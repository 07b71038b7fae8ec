"""Writing a checkpoint, at once or while training goes on; training/checkpoint.py says what is in it.

A save has three parts. `begin` (all ranks together) plans it through megatron-core and takes the tensors to
host memory. Then each rank writes its own files (training/writing.py): in the main thread, or with
`asynchronous` in another, from copies that training doesn't touch. At last all ranks together write the
metadata and rename the folder: at once, or at the first `poll` after which every rank has written. A folder
with a visible name is whole, whenever a process dies.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.module import MegatronModule

from nextvid_mcore.config import RunConfig
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.training import manifest
from nextvid_mcore.training.manifest import CheckpointError
from nextvid_mcore.training.optimizer import RoleOptimizers, groups_of
from nextvid_mcore.training.together import reason_of, together
from nextvid_mcore.training.writing import HostMemory, Note, Pending, copied

# It warns of its own asynchronous saving, which is planned for removal, also on a synchronous save.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)

STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")


def weight_tensors(module: MegatronModule, prefix: str, groups: RoleGroups) -> dict[str, ShardedTensor]:
    """Sharded tensors of a module's weights by state-dict name, keys starting with `prefix`.

    Transformer Engine's `_extra_state` (FP8 scales, found again: models/fp8.py) is left out: it is a pickle.
    """
    state = module.sharded_state_dict(
        prefix=prefix, metadata={"dp_cp_group": groups.collection.dp_cp, "singleton_local_shards": False}
    )
    return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def sharded_state(optimizers: RoleOptimizers, loading: bool) -> dict[str, Any]:
    """Everything of a checkpoint that is a tensor, as this rank's shards."""
    state: dict[str, Any] = {}
    for role, module in optimizers.modules.items():
        weights = weight_tensors(module, f"{role}.", groups_of(optimizers.groups, role))
        state[f"model.{role}"] = weights
        state[f"optimizer.{role}"] = optimizers.optimizers[role].sharded_tensors(weights, loading)
    return state


def visible(root: Path) -> list[Path]:
    """Checkpoints with a visible name, oldest first, whole or not."""
    found = [p for p in root.glob("step_*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _delete_old(root: Path, newest: Path, keep: int) -> None:
    if not keep:
        return
    for old in visible(root)[:-keep]:
        if old != newest:
            hidden = root / f".{old.name}.deleted"  # never half a checkpoint under a visible name
            old.rename(hidden)
            shutil.rmtree(hidden)


def _require_space(folder: Path, state: dict[str, Any]) -> None:
    """Fail before the first byte if the disk is too full for another checkpoint in `folder`."""
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


class Saver:
    """Saves a run's checkpoints, one at a time. Every rank makes one and calls all of it.

    Args:
        folder: the run's checkpoints.
        keep: newest checkpoints that stay; older ones are deleted once a new one is whole. 0: all.
        asynchronous: write while training goes on; else `begin` returns when the checkpoint is whole.
        newest: the checkpoint that the run was loaded from.
    """

    def __init__(
        self,
        folder: Path | str,
        config: RunConfig,
        optimizers: RoleOptimizers,
        keep: int = 0,
        asynchronous: bool = False,
        newest: Path | None = None,
    ) -> None:
        self.root, self.config, self.optimizers, self.keep = Path(folder).absolute(), config, optimizers, keep
        self.asynchronous, self.newest = asynchronous, newest
        self._pending: Pending | None = None

    def begin(
        self, step: int, samples: int, extra: dict[str, Any] | None = None, note: Note | None = None
    ) -> None:
        """Save a run after `step` steps; an earlier save is finished first.

        Args:
            samples: samples drawn so far.
            extra: further state of the loop, plain JSON values.
            note: is called on rank 0 with what the save cost, before the checkpoint becomes visible:
                `save_seconds` that training stood still, `save_host_gib` of memory on the worst rank, and
                later `save_background_seconds`.

        Raises:
            CheckpointError: on all ranks; the last whole checkpoint is named and stays as it is.
        """
        self.wait()
        final, partial = self.root / f"step_{step:08d}", self.root / f".step_{step:08d}.partial"
        begin, memory = time.perf_counter(), HostMemory()
        there = [self._together(final, lambda: self._prepare(final, partial))]
        dist.broadcast_object_list(there, src=0)
        if there[0]:
            self.newest = final
            return
        content = {
            "step": step,
            "samples": samples,
            "updates": self.optimizers.updates,
            "config": dataclasses.asdict(self.config),
            "layout": {
                role: dataclasses.asdict(groups_of(self.optimizers.groups, role).layout)
                for role in self.optimizers.modules
            },
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "megatron-core")},
            "extra": extra or {},
        }
        try:
            request, buckets = self._together(final, lambda: self._plan(partial))
            self._pending = Pending(final, partial, content, request, buckets, note, memory, begin)
            if self.asynchronous:
                self._note(self._pending, "save_seconds")
                self._pending.thread = threading.Thread(target=self._pending.write, daemon=True)
                self._pending.thread.start()
            else:
                self._pending.write()
                self._finish()
        except CheckpointError:
            self._abandon(partial)
            raise

    def check_space(self) -> None:
        """Before the first step: fail now rather than in the hour when the first checkpoint is due."""

        def prepare() -> dict[str, Any]:
            if dist.get_rank() == 0:
                self._sweep()
            return sharded_state(self.optimizers, loading=True)

        where = f"starting in {self.root.parent}"
        state = together(where, prepare)  # before the sum, in which all ranks take part
        folder = self.root if self.root.exists() else self.root.parent  # it may be a link to another disk
        together(where, lambda: _require_space(folder, state))

    def _sweep(self) -> None:
        """Away with what a process that died was writing."""
        for leftover in self.root.glob(".step_*"):
            shutil.rmtree(leftover)

    def poll(self) -> Path | None:
        """Between two steps: the checkpoint that has just become whole, if one has.

        While a save is under way this costs one all-reduce of a number.
        """
        if self._pending is None:
            return None
        done = torch.tensor(
            [int(not self._pending.thread.is_alive())],
            device="cuda" if dist.get_backend() == "nccl" else "cpu",
        )
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self.wait() if done.item() else None

    def wait(self) -> Path | None:
        """Until the save under way is whole; its folder."""
        if self._pending is None:
            return None
        partial = self._pending.partial
        self._pending.thread.join()
        try:
            self._finish()
        except CheckpointError:
            self._abandon(partial)
            raise
        return self.newest

    def _together(self, final: Path, action: Callable[[], Any]) -> Any:
        try:
            return together(f"saving {final}", action)
        except CheckpointError as error:
            last = f"the last whole one is {self.newest}" if self.newest else "there is no earlier one"
            raise CheckpointError(f"{error}; {last}") from error.__cause__

    def _abandon(self, partial: Path) -> None:
        self._pending = None
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _prepare(self, final: Path, partial: Path) -> bool:
        """On rank 0: an empty folder to write to, or True where this checkpoint is there already."""
        if dist.get_rank() != 0:
            return False
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        if final.exists():
            try:
                manifest.check_content(final, manifest.read_manifest(final))
                return True
            except CheckpointError:
                shutil.rmtree(final)  # a damaged one of the same step
        partial.mkdir()
        return False

    def _plan(self, partial: Path) -> tuple[Any, Any]:
        """What this rank has to write, in host memory."""
        self.optimizers.gather_weights()
        state = sharded_state(self.optimizers, loading=False)
        _require_space(self.root, state)
        # A plain queue: the writer runs in this process, and megatron-core's own spawns a manager process.
        filesystem_async._results_queue = queue.Queue()
        request = dist_checkpointing.save(
            state, str(partial), async_sharded_save=True, async_strategy="mcore"
        )
        buckets = None if request.preload_fn is None else request.preload_fn()
        if self.asynchronous and buckets is not None and not torch.cuda.is_available():
            buckets = copied(buckets)  # on a GPU they are copies already
        return request, buckets

    def _note(self, pending: Pending, name: str) -> None:
        """Tell the cost so far; all ranks take part."""
        costs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(costs, (time.perf_counter() - pending.begin, pending.memory.gib()))
        if dist.get_rank() == 0 and pending.note is not None:
            said = {name: max(seconds for seconds, _ in costs)}
            if name == "save_seconds":
                said["save_host_gib"] = max(gib for _, gib in costs)
            pending.note(said)

    def _finish(self) -> None:
        """What was written becomes a checkpoint."""
        pending, self._pending = self._pending, None
        assert pending is not None
        partial, final, rank = pending.partial, pending.final, dist.get_rank()

        def written() -> None:
            if pending.error is not None:
                free = shutil.disk_usage(self.root).free / 1e9
                reason = f"{reason_of(pending.error)} ({free:.3f} GB are free in {self.root})"
                raise CheckpointError(reason) from pending.error

        def close() -> None:
            for finalize in pending.request.finalize_fns:
                finalize()

        def describe() -> dict[str, Any]:
            if rank != 0:
                return pending.files
            manifest.write_json(partial / STATE, pending.content)
            others = [path for path in partial.iterdir() if not path.name.startswith("__")]
            for path in others:
                manifest.sync(path)
            return pending.files | {path.name: manifest.fingerprint(path) for path in others}

        def publish(files: dict[str, Any]) -> None:
            if rank == 0:
                manifest.write_json(partial / manifest.MANIFEST, files)
                manifest.sync(partial)
                partial.rename(final)
                manifest.sync(self.root)
                _delete_old(self.root, final, self.keep)

        self._together(final, written)  # before `close`, in which all ranks take part
        self._together(final, close)
        described: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(described, self._together(final, describe))
        self._note(pending, "save_seconds" if pending.thread is None else "save_background_seconds")
        self._together(final, lambda: publish({n: f for d in described for n, f in d.items()}))
        self.newest = final
