"""Where tensor ranks' rows lie in each other's memory, and what signals them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from nextvid_mcore.parallel import mailbox, reach
from nextvid_mcore.parallel.mailbox import ALIGNED, CopiedMailbox, Slots


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shapes", [((3, 5),), ((7, 40), (7, 40)), ((128, 8), (1, 1), (9, 100))])
def test_no_two_pushes_meet(ranks: int, shapes: tuple[tuple[int, int], ...]) -> None:
    slots = Slots(tuple(torch.Size(x) for x in shapes), 2, ranks)
    for rank in range(ranks):
        others = [source for source in range(ranks) if source != rank]
        taken = sorted(
            (2 * slots.start(slot, source, rank), 2 * math.prod(shape))
            for slot, shape in enumerate(shapes)
            for source in others
        )
        assert taken[0][0] == 0 and all(start % ALIGNED == 0 for start, _ in taken)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(taken))
        assert sum(taken[-1]) <= slots.size < sum(taken[-1]) + ALIGNED


class Shared:
    """What torch maps for all ranks, as one of them has it, without a GPU."""

    def __init__(self, ranks: list[Shared], size: int) -> None:
        self.ranks, self.rank = ranks, len(ranks)
        self.bytes, self.flags = torch.zeros(size, dtype=torch.uint8), {}
        ranks.append(self)

    def barrier(self, channel: int) -> None:
        assert channel == 0 and not self.flags, "a signal is left over"

    def get_buffer(self, rank: int, shape: torch.Size, dtype: torch.dtype, start: int) -> Tensor:
        return self.ranks[rank].bytes.view(dtype)[start : start + math.prod(shape)].view(shape)

    def put_signal(self, to: int, channel: int, timeout_ms: int) -> None:
        flags = self.ranks[to].flags
        assert channel > 0 and timeout_ms > 0 and (channel, self.rank) not in flags
        flags[channel, self.rank] = True

    def wait_signal(self, source: int, channel: int) -> None:
        assert self.flags.pop((channel, source), False), "waits for ever"


@pytest.fixture
def boxes() -> Iterator[list[CopiedMailbox]]:
    """Three ranks' in this process."""
    ranks: list[Shared] = []
    symmetric = mock.Mock(
        empty_strided_p2p=lambda size, *_: size[0], rendezvous=lambda size: Shared(ranks, size)
    )
    cuda = {name: mock.MagicMock() for name in ("Stream", "current_stream", "current_device")}
    with (
        mock.patch.multiple(torch.cuda, **cuda, stream=contextlib.nullcontext),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(mailbox.torch, "device"),
        mock.patch.object(torch._C._distributed_c10d, "_SymmetricMemory", symmetric),
        mock.patch.object(reach, "gathered", lambda group, mine: [mine]),
        mock.patch.object(reach, "patience", contextlib.nullcontext),
    ):
        groups = [mock.Mock(rank=lambda r=r: r, size=lambda: 3) for r in range(3)]
        yield [CopiedMailbox(group) for group in groups]


def opened(boxes: list[CopiedMailbox], slots: int) -> None:
    for box in boxes:
        box.open([torch.Size((3, 2))] * slots, torch.zeros(()))


def test_every_rank_takes_what_each_other_pushed(boxes: list[CopiedMailbox]) -> None:
    for exchange in range(2):
        opened(boxes, 2)
        for box, slot in itertools.product(boxes, range(2)):
            for to in box.others:
                value = 100 * exchange + 50 * slot + 10 * box.rank + to
                box.push(slot, to, torch.full((3, 2), float(value)).split([2, 1]))
        for box in boxes:
            for slot, source in itertools.product(range(2), box.others):
                value = 100 * exchange + 50 * slot + 10 * source + box.rank
                assert torch.all(box.take(slot, source) == value)
            box.close()


def test_a_signal_that_nobody_took_ends_the_run(boxes: list[CopiedMailbox]) -> None:
    """The next exchange would take it for its own, and rows that haven't come."""
    opened(boxes, 1)
    for box in boxes:
        for to in box.others:
            box.push(0, to, [torch.zeros(3, 2)])
    boxes[0].take(0, 1)
    with pytest.raises(RuntimeError, match=r"rows not taken, by slot and rank \[\(0, 2\)\]"):
        boxes[0].close()
    with pytest.raises(RuntimeError, match="broke off an exchange"):
        opened(boxes, 1)


def test_a_recording_that_broke_off_has_set_no_signal(boxes: list[CopiedMailbox]) -> None:
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        opened(boxes, 1)
    opened(boxes, 1)
