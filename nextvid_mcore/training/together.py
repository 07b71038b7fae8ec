"""What all ranks do, and fail at, together: nobody goes on waiting for one that has raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from nextvid_mcore.training import full_memory
from nextvid_mcore.training.manifest import CheckpointError


def together(what: str, action: Callable[[], Any]) -> Any:
    """Run `action` on every rank; if it failed on any, raise CheckpointError on all."""
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:  # torch's is not an Exception
        error = caught
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else reason_of(error))
    failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        rank, reason = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {reason}") from error
    return result


def reason_of(error: BaseException) -> str:
    """One line; of a failed write, what the ranks that failed said."""
    if isinstance(error, CheckpointException):
        told = [str(exception) for exception, _ in error.failures.values()]
        return "; ".join(told) or "the tensors could not be written"
    if full_memory.is_full(error):
        return f"the GPU's memory is full ({full_memory.account(error)})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, CheckpointError) else repr(error).splitlines()[0]
