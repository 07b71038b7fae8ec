"""The edge between seats without megatron-core's bridge: static shapes, nothing sent that nobody reads.

The bridge sends every tensor's shape ahead of it and waits for both (the host too), broadcasts over tensor
ranks what their leader got, and returns a gradient for all that came. Here both sides know the shapes, every
tensor rank hears from a partner of its own, sends are never waited for, receives are posted one micro-batch
ahead, and only what needs a gradient gets one.

Why nothing can wait for ever:

- Each direction of an edge has a group of its own, and in it each pair of ranks a communicator and a stream.
  Messages of a pair leave, and are taken, in the order of the micro-batches, and none stands behind a message
  that goes the other way.
- Only receives make the computation wait. Backward pass k of a seat comes after its forward pass k + w, with
  w (`Placement.warm_up`) not growing along the chain. So it waits at most for the next seat's backward pass
  k and, over the forward passes, for backward passes below k of the seats before: by induction over k, all
  come.
- Making an NCCL communicator takes the hosts of both ranks and may wait for the GPU, which may be waiting for
  a message. So all are made at the start, by every rank in the order of one list, before anything computes.

A receive that waits for its message is a kernel that spins; `CTAS` is all that it takes from the computation.
"""

from __future__ import annotations

import copy
import datetime
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from nextvid_mcore.parallel.edges import Message
from nextvid_mcore.parallel.placement import Seat
from nextvid_mcore.parallel.seats import Seats

CTAS = 4  # of an NCCL kernel, of over a hundred that run at once
AHEAD = 1  # receives posted beyond the one that is waited for


@dataclass(frozen=True)
class Wire:
    """`sender` sends part `part` of `parts` of its clips to `receiver`. Ranks of the world."""

    sender: int
    receiver: int
    part: int
    parts: int


def wires(source: Seat, target: Seat) -> list[Wire]:
    """Who sends what from `source` to `target`, the encoder with its last pipeline stage.

    A data replica hears from those that had its clips, in their order; a tensor rank from the rank of the
    same number, counted round.
    """
    found = []
    for data in range(target.layout.data):
        fan_in, fan_out = source.layout.data // target.layout.data, target.layout.data // source.layout.data
        for tensor in range(target.layout.tensor):
            receiver, partner = _rank(target, tensor, data), tensor % source.layout.tensor
            if fan_in:
                senders = [_rank(source, partner, data * fan_in + i) for i in range(fan_in)]
                found += [Wire(sender, receiver, 0, 1) for sender in senders]
            else:
                sender = _rank(source, partner, data // fan_out)
                found.append(Wire(sender, receiver, data % fan_out, fan_out))
    return found


def _rank(seat: Seat, tensor: int, data: int) -> int:
    layout = seat.layout
    return seat.first_rank + tensor + layout.tensor * (data + layout.data * (layout.pipeline - 1))


class Channel:
    """One direction of an edge. Rows [clips, values] travel, a message a micro-batch."""

    def __init__(self, source: Seat, target: Seat, timeout: float) -> None:
        """Every rank of the world must call it."""
        rank, self.all = dist.get_rank(), wires(source, target)
        self.outgoing = [wire for wire in self.all if wire.sender == rank]
        self.incoming = [wire for wire in self.all if wire.receiver == rank]
        limit = datetime.timedelta(seconds=timeout)
        ranks = sorted({end for wire in self.all for end in (wire.sender, wire.receiver)})
        self.group = dist.new_group(ranks, timeout=limit, pg_options=_options(limit))
        self._sent: deque[tuple[Any, Tensor]] = deque()  # kept alive until they have left
        self._posted: deque[tuple[list[Any], Tensor]] = deque()
        self._left, self._make = 0, lambda: torch.empty(0)

    def connect(self, device: torch.device) -> None:
        """Make every pair's communicator."""
        word = torch.zeros(1, device=device)
        for wire in self.all:
            if wire in self.outgoing:
                dist.send(word, wire.receiver, group=self.group)
            elif wire in self.incoming:
                dist.recv(word, wire.sender, group=self.group)

    def begin(self, count: int, make: Callable[[], Tensor]) -> None:
        """Expect `count` messages, each into what `make` returns: [clips, values] of this rank's replica."""
        self._left, self._make = count if self.incoming else 0, make

    def send(self, rows: Tensor) -> None:
        rows = rows.detach()
        for wire in self.outgoing:
            part = rows.chunk(wire.parts)[wire.part].contiguous()
            self._sent.append((dist.isend(part, wire.receiver, group=self.group), part))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def receive(self) -> Tensor:
        """The next message; on a GPU its stream waits, not the host."""
        while self._left and len(self._posted) <= AHEAD:
            self._post()
        works, rows = self._posted.popleft()
        for work in works:
            work.wait()
        return rows

    def _post(self) -> None:
        rows = self._make()
        parts = rows.chunk(len(self.incoming))
        self._posted.append(
            (
                [
                    dist.irecv(part, wire.sender, group=self.group)
                    for part, wire in zip(parts, self.incoming, strict=True)
                ],
                rows,
            )
        )
        self._left -= 1

    def finish(self) -> None:
        """All messages of the pass have been taken, and so have left."""
        while self._sent:
            self._sent.popleft()[0].wait()


def _options(limit: datetime.timedelta) -> Any:
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = limit
    options.config.max_ctas = CTAS
    return options


@dataclass(frozen=True)
class Sizes:
    """Values of a clip that cross an edge: `trained` both ways, `beside` (features) forward alone."""

    trained: int
    beside: int = 0


class DirectCommunicator:
    """What megatron-core's 1F1B schedule asks of a communicator, over the chain of seats.

    An edge counts as a stage of its own: the seats before it run one micro-batch further ahead, so that a
    message on its way leaves nobody idle.
    """

    def __init__(
        self, seats: Seats, config: ModelParallelConfig, device: torch.device, timeout: float
    ) -> None:
        """Every rank of the world must call it. timeout: seconds that a message may take."""
        self.config, self.device = config, device
        placement, self.seat = seats.placement, seats.mine[0]
        home, chain = seats.home, placement.seats
        here = chain.index(self.seat)
        self.stage, self.stages = home.pipeline_rank, home.layout.pipeline
        edges = [(Channel(a, b, timeout), Channel(b, a, timeout)) for a, b in itertools.pairwise(chain)]
        for channel in itertools.chain(*edges):
            channel.connect(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first, last = self.stage == 0, self.stage == self.stages - 1
        self.before = edges[here - 1] if here > 0 and first else None
        self.after = edges[here] if here < len(edges) and last else None
        self.source = chain[here - 1].name if here > 0 else None
        self.is_pp_first_stage, self.is_pp_last_stage = here == 0 and first, here == len(edges)
        self.current_stage = 0
        self.total_stages = 1 + placement.warm_up(self.seat, self.stage, "direct")
        if self.stages > 1:
            fixed = copy.copy(config)  # separate seats must be of changing lengths, these are not
            fixed.variable_seq_lengths = False
            self.pipeline = P2PCommunicator(home.collection.pp, fixed)
        self._shape: tuple[int, ...] = ()
        self._before = Sizes(0)
        self._trains = True

    def begin(
        self,
        count: int,
        clips: int,
        before: Sizes,
        after: Sizes,
        hidden: tuple[int, ...],
        forward_only: bool,
    ) -> None:
        """A pass over `count` micro-batches of `clips` clips of this replica.

        Args:
            before, after: what crosses the edge into this seat, and out of it.
            hidden: shape between this seat's pipeline stages.
        """
        self._shape, self._before, self._trains = hidden, before, not forward_only

        def rows(values: int) -> Callable[[], Tensor]:
            return lambda: torch.empty(clips, values, dtype=self.config.pipeline_dtype, device=self.device)

        if self.before:
            self.before[0].begin(count, rows(before.trained + before.beside))
        if self.after and not forward_only:
            self.after[1].begin(count, rows(after.trained))

    def finish(self) -> None:
        """The pass has ended."""
        if self.before:
            self.before[1].finish()
        if self.after:
            self.after[0].finish()

    def recv_forward(self, *_: Any) -> Message:
        if self.before:
            rows = self.before[0].receive()
            features = rows[:, self._before.trained :] if self._before.beside else None
            trained = rows[:, : self._before.trained].detach().requires_grad_(self._trains)
            return Message({self.source: trained}, features)
        if self.stage > 0:
            return Message({self.seat.name: self.pipeline.recv_forward(self._shape, False)})
        return Message()

    def send_forward(self, output: Message, *_: Any) -> None:
        if self.after:
            rows = output[self.seat.name]
            beside = [] if output.features is None else [output.features]
            self.after[0].send(torch.cat([rows, *beside], dim=1) if beside else rows)
        elif self.stage < self.stages - 1:
            self.pipeline.send_forward(output[self.seat.name], False)

    def recv_backward(self, *_: Any) -> dict[str, Tensor]:
        if self.after:
            return {self.seat.name: self.after[1].receive()}
        if self.stage < self.stages - 1:
            return {self.seat.name: self.pipeline.recv_backward(self._shape, False)}
        return {}

    def send_backward(self, grads: dict[str, Tensor], *_: Any) -> None:
        if self.before:
            self.before[1].send(grads[self.source])
        elif self.stage > 0:
            self.pipeline.send_backward(grads[self.seat.name], False)

    def send_forward_recv_backward(self, output: Message, *_: Any) -> dict[str, Tensor]:
        if not self.after and self.stage < self.stages - 1:
            grad = self.pipeline.send_forward_recv_backward(output[self.seat.name], self._shape, False)
            return {self.seat.name: grad}
        self.send_forward(output)
        return self.recv_backward()

    def send_backward_recv_forward(self, grads: dict[str, Tensor], *_: Any) -> Message:
        if not self.before and self.stage > 0:
            name = self.seat.name
            return Message({name: self.pipeline.send_backward_recv_forward(grads[name], self._shape, False)})
        self.send_backward(grads)
        return self.recv_forward()
