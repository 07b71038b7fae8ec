"""The reference's pass beside the student's, on a CUDA stream of its own (`--train.reference-stream own`).

Nobody reads the reference's features before the alignment loss, and it reads nothing of the others: in a
recorded pass its kernels then fill the gaps and tails of theirs, and under tensor parallelism each side's
collectives run beside the other's matrix products. Two streams may share nothing that one of them writes:

    process groups    NCCL runs a communicator's collectives one after the other: the reference's place has a
                      tensor group of its own (parallel/seats.py)
    scratch memory    Transformer Engine gives its products one workspace a device, megatron-core its gathered
                      sequences one buffer: here are others. torch has one workspace a stream
    scales            where a network's pass ends, Transformer Engine renews the scales of all: those of the
                      reference are held back until it was waited for (models/fp8.py)
    tensors           each stream takes its memory from blocks of its own, and the pass keeps what it handed
                      over until the end. What the reference frees, the others can't take: parallel/memory.py

Eager passes (graphs.WARM) take the same way, but wait at once: they make what is made on first use.

Two communicators at a time in no common order are what NCCL and torch warn of: a kernel that waits for
another rank's must not keep that one's counterpart from starting. (NCCL_LAUNCH_ORDER_IMPLICIT would make an
order, and put the student's first collective behind the reference's last.) Here at most two are under way,
one a stream; each takes 64 blocks at most, NCCL's limit, of an H100's 132 processors, and all else that runs
ends by itself: so whichever comes first, the other finds room. A hang would be ended by the watchdog.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor

from nextvid_mcore.models import fp8
from nextvid_mcore.training.ahead import Pending

_TE_PRODUCTS = "transformer_engine.pytorch.cpp_extensions.gemm"


@dataclass(frozen=True)
class Tuning:
    """How the two streams share a GPU: what runs take, and benchmarks/train_step.py changes.

    student, reference: priorities of the streams; the lower number goes first where blocks wait for room.
    margin: processors that Transformer Engine's products leave free over tensor ranks while both streams run.
        Such a kernel brings a block for every processor and ends with the last of them: where a collective
        holds some, it would take up to twice its time.
    """

    student: int = 0
    reference: int = 0
    margin: int = 0


tuning = Tuning()


class Beside:
    """Starts the reference's pass, or without CUDA runs it in line."""

    def __init__(self, reference: MegatronModule, device: torch.device) -> None:
        self.reference = reference
        self.stream = _another_stream(device) if device.type == "cuda" else None
        self._workspace: Callable[..., Any] | None = None

    def start(self, work: Callable[[], Tensor], until: ExitStack) -> Pending:
        """Begin `work`, the reference's pass; the returned function waits for what it makes.

        What `work` reads must be kept as it is until then. `until` ends with the pass, also a broken one.
        """
        both = until.enter_context(ExitStack())
        if self.reference.config.tensor_model_parallel_size > 1:
            both.enter_context(_margin(tuning.margin))
        made = self._begun(work)
        both.enter_context(fp8.held_back(self.reference))

        def result() -> Tensor:
            if self.stream is not None:
                torch.cuda.current_stream().wait_stream(self.stream)
            both.close()
            fp8.update_scales(self.reference)
            return made

        return result

    def _begun(self, work: Callable[[], Tensor]) -> Tensor:
        if self.stream is None:
            with self._scratch():
                return work()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), self._scratch():
            made = work()
        if not torch.cuda.is_current_stream_capturing():
            current.wait_stream(self.stream)
        return made

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[None]:
        """Inside, what libraries keep one of for all is the reference's own."""
        products: Any = sys.modules.get(_TE_PRODUCTS)
        buffer, parallel_state._GLOBAL_MEMORY_BUFFER = (
            parallel_state._GLOBAL_MEMORY_BUFFER,
            GlobalMemoryBuffer(),
        )
        if products is not None:  # its function allocates what it is first asked for, and remembers
            shared = products.get_cublas_workspace
            self._workspace = self._workspace or functools.cache(shared.__wrapped__)
            products.get_cublas_workspace = self._workspace
        try:
            yield
        finally:
            parallel_state._GLOBAL_MEMORY_BUFFER = buffer
            if products is not None:
                products.get_cublas_workspace = shared


def _another_stream(device: torch.device) -> torch.cuda.Stream:
    """Not the current one: torch hands out 32 of a priority in turn."""
    found = torch.cuda.Stream(device, priority=tuning.reference)
    return found if found != torch.cuda.current_stream(device) else _another_stream(device)


@contextlib.contextmanager
def _margin(processors: int) -> Iterator[None]:
    """Inside, Transformer Engine's products leave so many processors free: it reads the environment."""
    if processors == 0 or "NVTE_EXT_MARGIN_SM" in os.environ:
        yield
        return
    os.environ["NVTE_EXT_MARGIN_SM"] = str(processors)
    try:
        yield
    finally:
        del os.environ["NVTE_EXT_MARGIN_SM"]
