"""Two chunks of frames on their way at a time: one waits for memory, the other computes.

A GPU begins all programs of a kernel before those of the next that became ready, of whatever stream, unless
a stream has priority. So what only moves memory goes first, with so few programs that those of a convolution
find room beside them on every multiprocessor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made", bound=Sequence[Tensor])


@dataclass(frozen=True)
class Lane:
    """Two streams that take turns, so that what is launched here runs in the order of the launches."""

    products: torch.cuda.Stream
    memory: torch.cuda.Stream
    at_most: int  # programs that a multiprocessor is to hold of what only moves memory

    @contextlib.contextmanager
    def moves(self) -> Iterator[None]:
        """What is launched inside goes first."""
        self.memory.wait_stream(self.products)
        with torch.cuda.stream(self.memory):
            yield
        self.products.wait_stream(self.memory)


class Lanes:
    """`count` of them; the current stream sees one piece of work after the other, begun and ended in it."""

    def __init__(self, device: torch.device, count: int = 2, at_most: int = 2) -> None:
        self.lanes = [
            Lane(torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1), at_most)
            for _ in range(count)
        ]

    def run(self, works: Sequence[Callable[[Lane], Made]]) -> list[Made]:
        """The results of `works`, each called with its lane, whose streams its kernels are to run on."""
        current = torch.cuda.current_stream()
        made = []
        for lane in self.lanes:
            lane.products.wait_stream(current)
        for i, work in enumerate(works):
            lane = self.lanes[i % len(self.lanes)]
            with torch.cuda.stream(lane.products):
                made.append(work(lane))
        for lane in self.lanes:
            current.wait_stream(lane.products)
        for each in made:
            for x in each:
                x.record_stream(current)
        return made
