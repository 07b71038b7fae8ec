"""Process groups of their own for every case of a benchmark, in processes that stay."""

from __future__ import annotations

import datetime
import functools
import gc
import os

import torch
import torch.distributed as dist

PATIENCE = 180.0  # seconds for one collective


@functools.cache
def meeting_point() -> dist.Store:
    """The launcher's store, or one that rank 0 keeps."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not agent and os.environ["RANK"] == "0",
    )


def first_says(number: int, value: bool) -> bool:
    """What rank 0 says, before case `number`; for decisions that clocks could make differently."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return value
    key = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number} begins"
    if os.environ["RANK"] == "0":
        meeting_point().set(key, str(int(value)))
    meeting_point().wait([key], datetime.timedelta(seconds=3 * PATIENCE))
    return meeting_point().get(key) == b"1"


def join(number: int, alone: bool = False) -> None:
    """A world of its own for case `number`, so that nothing of an earlier one is left.

    alone: every process is a world of one, on its own GPU, at the same time as the others.
    """
    from nextvid_mcore.parallel.groups import init_distributed  # benchmarks/common.py has found the clone

    cuda, key = torch.cuda.is_available(), f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number}"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    single = alone or "RANK" not in os.environ
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.HashStore() if single else dist.PrefixStore(key, meeting_point()),
        rank=0 if single else int(os.environ["RANK"]),
        world_size=1 if single else int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    init_distributed(PATIENCE)


def leave() -> None:
    """End the case's process groups and give back its memory; recorded passes must be gone."""
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    BridgeCommunicator._broadcast_pg_cache.clear()
    BridgeCommunicator._bridge_pg_cache.clear()
    gc.collect()
    dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
