"""Run a function on several gloo processes of this machine and collect what every rank returns.

    from launch import run
    results = run(function, 2, *args)      # function(*args) on 2 ranks -> [result of rank 0, of rank 1]

The function must stand at a module's top level (the processes are spawned). The first rank that fails, or
the time limit, ends the whole group, grandchildren included.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RankFailure(RuntimeError):
    """A rank raised, died or ran out of time."""


def _entry(function: Callable, args: tuple, rank: int, nproc: int, port: int, folder: str) -> None:
    os.setsid()  # a process group of its own, so that its children can be ended with it
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        result = function(*args)
        torch.save(result, f"{folder}/result.{rank}.tmp")
        os.rename(f"{folder}/result.{rank}.tmp", f"{folder}/result.{rank}")
    except BaseException:
        Path(f"{folder}/error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _kill(processes: list) -> None:
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    for process in processes:
        process.join()


def run(function: Callable, nproc: int, *args: Any, timeout: float = 120.0, check: bool = True) -> list[Any]:
    """Call `function(*args)` on `nproc` ranks with torchrun's environment; return every rank's result.

    Args:
        timeout: seconds after which the group is ended and RankFailure raised.
        check: False: a rank may fail or die; the others are ended and its result is None.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        processes = [
            context.Process(target=_entry, args=(function, args, rank, nproc, port, folder))
            for rank in range(nproc)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            while any(p.exitcode is None for p in processes):
                if any(p.exitcode not in (None, 0) for p in processes):
                    time.sleep(0.2 if check else 1.0)  # let the others write their own error
                    break
                if time.monotonic() > deadline:
                    raise RankFailure(f"{function.__name__} on {nproc} ranks took over {timeout} s")
                time.sleep(0.02)
        finally:
            _kill([p for p in processes if p.pid is not None])
        errors = sorted(Path(folder).glob("error.*"))
        if check and errors:
            text = "\n".join(f"--- rank {e.suffix[1:]}\n{e.read_text()}" for e in errors)
            raise RankFailure(f"{function.__name__} failed:\n{text}")
        results = []
        for rank in range(nproc):
            path = Path(folder) / f"result.{rank}"
            if check and not path.exists():
                raise RankFailure(f"rank {rank} of {function.__name__} died: {processes[rank].exitcode}")
            results.append(torch.load(path, weights_only=False) if path.exists() else None)
        return results
