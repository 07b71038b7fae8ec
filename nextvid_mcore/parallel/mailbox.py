"""What tensor ranks put into each other's memory while they compute.

A collective of NCCL is a kernel: it waits for the products before it and those after wait for it. Here a rank
copies rows to the others itself, from a stream of its own. On GPUs these are copies by the copy engines over
NVLink into memory that torch maps for all of them (`torch.distributed._symmetric_memory`), so that all
multiprocessors go on with products. All of it can be recorded: kernels, copies and events, at addresses that
stay. Elsewhere the rows go by the group's own sends and receives, which is the reference.

One exchange is open, push ..., take ..., close, the same on every rank of the group and in the same order.

Why what is taken is whole: torch's `put_signal` is a kernel of one warp that follows the copies in their
stream and sets its flag by a release at system scope; `wait_signal` takes it back by an acquire at system
scope, ahead of the kernels that read. (In torch 2.11's code for sm_90: MEMBAR.ALL.SYS before an
ATOM.CAS.STRONG.SYS, CCTL.IVALL after one.) The next `open`'s barrier, ahead of which rows aren't overwritten,
is made of the same two.

Why nobody waits for ever: a rank puts all its signals of a slot ahead of the first that it takes, in the
order in which it issues work, and `take` lets no graph turn that round. So even a rank that does one thing
after the other (CUDA_DEVICE_MAX_CONNECTIONS=1) waits for nothing that waits for it. A signal waits for its
flag to be free, and all are since the barrier: `close` and `open` see to it that each was taken. A recording
that broke off hasn't run and has set none. Where a rank fails inside a pass the others wait for it on the
device, as in a collective of NCCL, and torchrun or parallel/watchdog.py ends them.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextvid_mcore.config import ConfigError
from nextvid_mcore.parallel import reach

ALIGNED = 256  # bytes, to which slots are rounded up: products read what lies there
FREE = 10_000  # ms after which a flag that isn't free ends the process: it is, unless a rule was broken
LATE = "another rank failed"


class SentMailbox:
    """By sends and receives of the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._coming: dict[tuple[int, int], tuple[dist.Work, Tensor]] = {}

    def open(self, shapes: Sequence[torch.Size], like: Tensor) -> None:
        """Slot i of the exchange has `shapes[i]`, one for every other rank, with the dtype of `like`."""
        for slot, shape in enumerate(shapes):
            for source in self.others:
                space = like.new_empty(shape)
                work = dist.irecv(space, group=self.group, group_src=source, tag=slot)
                self._coming[slot, source] = work, space

    def push(self, slot: int, to: int, parts: Iterable[Tensor]) -> None:
        """Send the rows of `parts`, one part below the other, to rank `to` of the group."""
        rows = torch.cat(list(parts))
        self._sent.append((dist.isend(rows, group=self.group, group_dst=to, tag=slot), rows))

    def take(self, slot: int, source: int) -> Tensor:
        """What rank `source` of the group has pushed; to be read before `close`."""
        work, rows = self._coming.pop((slot, source))
        work.wait()
        return rows

    def close(self) -> None:
        """What was pushed may be overwritten."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


@dataclass(frozen=True)
class Slots:
    """Where rows lie in a rank's memory: slot by slot, and in each by who pushes; in elements."""

    shapes: tuple[torch.Size, ...]
    width: int  # bytes of an element
    ranks: int

    def _step(self, slot: int) -> int:
        return -(-math.prod(self.shapes[slot]) * self.width // ALIGNED) * ALIGNED // self.width

    def start(self, slot: int, source: int, rank: int) -> int:
        """Of what `source` pushes to `rank`."""
        before = sum(self._step(other) for other in range(slot)) * (self.ranks - 1)
        return before + ((source - rank) % self.ranks - 1) * self._step(slot)

    @property
    def size(self) -> int:
        """Bytes of them all."""
        return sum(self._step(slot) for slot in range(len(self.shapes))) * (self.ranks - 1) * self.width


class CopiedMailbox:
    """By copies into the others' memory, on one host's GPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it is not used
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._stream = torch.cuda.Stream()
        self._sent: list[Tensor] = []
        self._due: set[tuple[int, int]] = set()  # what is yet to be taken, by slot and source
        self._records = False
        self._pushed: dict[int, torch.cuda.Event] = {}
        self._all = []  # recorded passes go on using the memory they were recorded with
        self._grow(1 << 20)

    def _grow(self, size: int) -> None:
        """Memory of `size` bytes that every rank of the group maps; all ranks call this."""
        from torch._C._distributed_c10d import _SymmetricMemory

        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"tensor ranks exchange {size} bytes for the first time while a pass is recorded"
            )
        device, name = torch.device("cuda", torch.cuda.current_device()), self.group.group_name
        of_bytes = (size,), (1,), torch.uint8, device, name

        def together(step: Callable[[], Any]) -> Any:
            """What `step` gives, or an error on every rank if one failed."""
            made, reason = None, None
            try:
                made = step()
            except dist.DistStoreError:
                reason = LATE
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
            failed = sorted(filter(None, reach.gathered(self.group, reason)), key=LATE.__eq__)
            if not failed:
                return made
            raise ConfigError(
                f"tensor ranks can't map {size} bytes of each other's memory ({failed[0]}); use "
                "--parallel.tensor-overlap off"
            )

        memory = together(lambda: _SymmetricMemory.empty_strided_p2p(*of_bytes))
        with reach.patience(self.group):
            self._here = together(lambda: _SymmetricMemory.rendezvous(memory))
        self._all.append((memory, self._here))
        self._bytes = size

    def open(self, shapes: Sequence[torch.Size], like: Tensor) -> None:
        """Slot i of the exchange has `shapes[i]`, one for every other rank, with the dtype of `like`."""
        if self._due and not self._records:
            raise RuntimeError("tensor ranks broke off an exchange, whose signals the next would take")
        self._sent.clear()  # of a recording that broke off
        self._records = torch.cuda.is_current_stream_capturing()
        self._due = set(itertools.product(range(len(shapes)), self.others))
        self._dtype = like.dtype
        self._slots = Slots(tuple(shapes), like.element_size(), self.size)
        if self._slots.size > self._bytes:
            self._grow(self._slots.size)
        self._here.barrier(channel=0)  # all have read what lay there

    def _space(self, slot: int, source: int, rank: int) -> Tensor:
        """Where in `rank`'s memory `source` puts slot `slot`."""
        place = self._slots.start(slot, source, rank)
        return self._here.get_buffer(rank, self._slots.shapes[slot], self._dtype, place)

    def push(self, slot: int, to: int, parts: Iterable[Tensor]) -> None:
        """Copy the rows of `parts`, one part below the other, to rank `to`, beside what is computed next."""
        space = self._space(slot, self.rank, to)
        done = 0
        for part in parts:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                space[done : done + len(part)].copy_(part)
            self._sent.append(part)
            done += len(part)
        with torch.cuda.stream(self._stream):
            self._here.put_signal(to, channel=slot + 1, timeout_ms=FREE)  # channel 0 is the barrier's
        self._pushed[slot] = self._stream.record_event()

    def take(self, slot: int, source: int) -> Tensor:
        """What rank `source` of the group has pushed; to be read before `close`."""
        self._due.remove((slot, source))
        # first what the others wait for: a recorded pass may put branches that it could run together in a row
        torch.cuda.current_stream().wait_event(self._pushed[slot])
        self._here.wait_signal(source, channel=slot + 1)
        return self._space(slot, source, self.rank)

    def close(self) -> None:
        """What was pushed may be overwritten."""
        torch.cuda.current_stream().wait_stream(self._stream)
        self._sent.clear()
        if self._due:
            raise RuntimeError(f"an exchange ended with rows not taken, by slot and rank {sorted(self._due)}")


Mailbox = SentMailbox | CopiedMailbox
_found: dict[str, tuple[dist.ProcessGroup, Mailbox | str]] = {}  # by group, its mailbox or why it has none


def usable(group: dist.ProcessGroup, must: bool) -> bool:
    """Whether the group can have a mailbox, which is made then; every rank of it calls this.

    Raises:
        ConfigError: it can't, and `must`.
    """
    known, found = _found.get(group.group_name, (None, ""))
    if known is not group:  # names come again after groups were destroyed
        copies = dist.get_backend(group) == "nccl"
        found = (reach.reason(group) or _mapped(group)) if copies else SentMailbox(group)
        _found[group.group_name] = group, found
    if must and isinstance(found, str):
        raise ConfigError(f"parallel tensor-overlap on: {found}; use --parallel.tensor-overlap auto or off")
    return not isinstance(found, str)


def _mapped(group: dist.ProcessGroup) -> Mailbox | str:
    """By copies; or why some rank can't map the others' memory, as in a container that forbids it."""
    try:
        return CopiedMailbox(group)
    except ConfigError as error:
        return str(error).partition("; use ")[0]


def of(group: dist.ProcessGroup) -> Mailbox:
    """The group's, which is `usable`."""
    return _found[group.group_name][1]


def note(group: dist.ProcessGroup) -> str | None:
    """For the log: how the group exchanges rows, where that was a question."""
    known, found = _found.get(group.group_name, (None, ""))
    if known is not group:
        return None
    how = f"in line: {found}" if isinstance(found, str) else "beside products"
    return f"tensor ranks exchange rows {how}"
