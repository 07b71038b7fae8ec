"""The ranks of a probe: torchrun's environment or a single process; sums and gathers of small things."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nextvid_mcore.config import ConfigError, require


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[int] | range) -> list[int]:
        """This rank's stretch of `items`; stretches differ in length by at most one."""
        total = len(items)
        return list(items[total * self.rank // self.size : total * (self.rank + 1) // self.size])

    def sum(self, value: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The rows of all ranks, in rank order; ranks may have different numbers of them."""
        if self.size == 1:
            return value
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = len(value)
        longest = int(self.sum(counts).max())
        padded = value.new_zeros((longest, *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device))


def device_of(name: str) -> torch.device:
    """The device that --device names, if it is there."""
    try:
        where = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: write cpu, cuda or cuda:1") from None
    require(where.type in ("cpu", "cuda"), f"--device {name}: write cpu, cuda or cuda:1")
    there = torch.cuda.device_count()
    require(
        where.type == "cpu" or (where.index or 0) < there,
        f"--device {name}: this machine has {there} GPUs; write --device cpu",
    )
    return where


def start(device: str | None = None, timeout: float = 3600.0) -> Ranks:
    """Join torchrun's processes: NCCL on GPUs, gloo on a CPU. Without torchrun: this process alone."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda":
        if where.index is None:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(where)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return Ranks(rank, size, where)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
