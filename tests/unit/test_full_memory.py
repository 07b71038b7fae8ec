"""What counts as a full memory, whose memory it is, and which settings are named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nextvid_mcore import cli
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.placement import Placement, Seat
from nextvid_mcore.parallel.seats import Seats
from nextvid_mcore.training import full_memory
from nextvid_mcore.training.full_memory import FullMemory
from nextvid_mcore.training.online_knn import OnlineKnn
from nextvid_mcore.training.together import reason_of

TORCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total ...")
NCCL = torch.distributed.DistBackendError(
    "NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 bytes"
)


@pytest.mark.parametrize(
    "error", [TORCH, NCCL, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ...")]
)
def test_every_library_that_is_out_of_memory_is_heard(error: RuntimeError) -> None:
    with pytest.raises(FullMemory, match="here: the GPU's memory is full with 3; lower it") as found:
        with full_memory.told("here", "with 3; lower it"):
            raise error
    assert found.value.__cause__ is error and "\n" not in str(found.value)


def test_other_errors_stay() -> None:
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("x")):
        with pytest.raises(type(error), match=str(error)), full_memory.told("here", ""):
            raise error


def test_who_holds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70 * 2**30)
    held = "70.0 of 80.0 GiB reserved by torch here, 9.5 by CUDA, NCCL and other programs; "
    assert full_memory.account(TORCH) == held + "512.00 MiB more asked for"
    assert full_memory.account(NCCL) == held + "Failed to CUDA calloc"
    assert reason_of(TORCH) == f"the GPU's memory is full ({held}512.00 MiB more asked for)"


def test_a_pass_of_the_knn_is_as_large_as_the_larger_of_two_settings() -> None:
    def ways(line: str, training: str = "--stages.2.micro-batch") -> str:
        config, _ = cli.parse(["digits_32", "--dry-run", *line.split()])
        size = max(config.eval.batch, config.micro_batch(config.stages[0]))
        return OnlineKnn._lower(SimpleNamespace(config=config, size=size), training)

    assert ways("") == "--stages.0.micro-batch, or --stages.2.micro-batch"
    assert ways("--eval.batch 128") == "--eval.batch, or --stages.2.micro-batch"
    assert ways("--eval.batch 64").startswith("--eval.batch and --stages.0.micro-batch, or")
    assert ways("--train.micro-batch 64", "--train.micro-batch") == "--train.micro-batch"
    assert ways("--train.micro-batch 1 --eval.batch 1") == "--stages.2.micro-batch"


def test_ranks_are_apart_where_none_waits_inside_a_pass() -> None:
    def apart(*layouts: Layout) -> bool:
        seats = tuple(Seat(str(i), (), layout, 0) for i, layout in enumerate(layouts))
        return Seats(Placement("colocated", seats), {}).apart

    assert apart(Layout(data=8)) and apart(Layout())
    assert not apart(Layout(tensor=2)) and not apart(Layout(pipeline=2))
    assert not apart(Layout(data=2), Layout(data=2))
