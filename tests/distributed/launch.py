"""Run functions on several gloo processes of this machine and collect what every rank returns.

    from launch import run, shared
    results = run(function, 2, *args)      # function(*args) on 2 new ranks -> [result of rank 0, of rank 1]
    results = shared(2).run(function, *args)   # the same on 2 ranks that later calls use again: far faster

The function must stand at a module's top level (the processes are spawned). The first rank that fails, or
the time limit, ends the whole group, grandchildren included; a shared one is then started anew.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankFailure(RuntimeError):
    """A rank raised, died or ran out of time."""


def _work(tasks: Connection, rank: int, nproc: int, port: int) -> None:
    """A rank: take (function, args) from the pipe, send ("ok", saved result) or ("error", traceback)."""
    os.setsid()  # a process group of its own, so that its children can be ended with it
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = tasks.recv()
        except EOFError:
            os._exit(0)
        try:
            saved = io.BytesIO()
            torch.save(function(*args), saved)
            tasks.send(("ok", saved.getvalue()))
            _drop_groups()
        except BaseException:
            tasks.send(("error", traceback.format_exc()))


def _drop_groups() -> None:
    """End the process groups of a case: each has threads of its own that go on polling."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # the others may still be receiving
        world = dist.distributed_c10d._world
        for group in [x for x in world.pg_map if x is not dist.group.WORLD]:
            dist.destroy_process_group(group)
        bridge = sys.modules.get("megatron.core.pipeline_parallel.bridge_communicator")
        if bridge is not None:  # it keeps its groups for the next communicator
            bridge.BridgeCommunicator._broadcast_pg_cache.clear()
            bridge.BridgeCommunicator._bridge_pg_cache.clear()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class World:
    """`nproc` ranks with torchrun's environment, alive until `close` or a failure."""

    def __init__(self, nproc: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(nproc):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, rank, nproc, port))
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                process.kill()  # not yet the leader of its group
        for process in self.processes:
            process.join()
        self.pipes = []

    def run(self, function: Callable, *args: Any, timeout: float = 120.0, check: bool = True) -> list[Any]:
        """Call `function(*args)` on every rank; return every rank's result.

        Args:
            timeout: seconds after which the group is ended and RankFailure raised.
            check: False: a rank may fail or die; the others are ended and its result is None.
        """
        import torch

        for pipe in self.pipes:
            pipe.send((function, args))
        results: list[Any] = [None] * len(self.pipes)
        waiting, problems = dict(enumerate(self.pipes)), []
        deadline = time.monotonic() + timeout
        while waiting:
            for rank, pipe in list(waiting.items()):
                if not pipe.poll(0.01):
                    continue
                del waiting[rank]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    kind, value = "error", "the process died"
                if kind == "ok":
                    results[rank] = torch.load(io.BytesIO(value), weights_only=False)
                else:
                    problems.append(f"--- rank {rank}\n{value}")
            if problems:  # give the others a moment to say what they saw
                deadline = min(deadline, time.monotonic() + 1.0)
            if time.monotonic() > deadline:
                break
        if waiting and not problems:
            problems.append(f"rank(s) {sorted(waiting)} took over {timeout} s")
        if problems:
            self.close()
            if check:
                name = getattr(function, "__name__", repr(function))
                raise RankFailure(f"{name} failed:\n" + "\n".join(problems))
        return results


def run(function: Callable, nproc: int, *args: Any, timeout: float = 120.0, check: bool = True) -> list[Any]:
    """Call `function(*args)` on `nproc` new ranks; see `World.run`."""
    world = World(nproc)
    try:
        return world.run(function, *args, timeout=timeout, check=check)
    finally:
        world.close()


_shared: dict[int, World] = {}


def shared(nproc: int) -> World:
    """The world of `nproc` ranks that all tests of this process use in turn."""
    if nproc not in _shared or not _shared[nproc].pipes:
        _shared[nproc] = World(nproc)
    return _shared[nproc]


@atexit.register
def _close_shared() -> None:
    for world in _shared.values():
        world.close()
