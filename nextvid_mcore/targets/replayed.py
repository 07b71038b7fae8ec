"""A frozen network as one CUDA graph: to launch its kernels one by one can take longer than they do.

VA-VAE's encoder makes about 80 launches for every 32 frames. One host took several times as long for them as
others, and the device waited for half of the encoder's time (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nextvid_mcore.recording import Recording, capture

log = logging.getLogger(__name__)

Network = Callable[[Tensor], tuple[Tensor, ...]]
WARM = 2  # calls of a shape before it is recorded: they compile, and cuDNN tries its kernels


@dataclass
class Shape:
    """The calls with an input of one shape, and what is replayed once there is a graph."""

    calls: int = 0
    x: Tensor | None = None
    recording: Recording[tuple[Tensor, ...]] | None = None
    played: torch.cuda.Event | None = None  # the last replay: the next may be on another stream


class Replayed:
    """Stands for `network`, which must do the same launches whenever its input has the same shape.

    The first replay is compared with a call of the network, to the bit. Where that fails, or the recording,
    the network is called from then on, and the log says why.
    """

    def __init__(self, network: Network, name: str, capture: Callable = capture) -> None:
        """capture: see recording.py."""
        self.network, self.name, self.capture = network, name, capture
        self.gave_up = False
        self.shapes: dict[tuple, Shape] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.gave_up:
            return self.network(x)
        here = self.shapes.setdefault((x.shape, x.stride(), x.dtype, x.device), Shape())
        if here.recording is not None:
            return self._replay(here, x)
        here.calls += 1
        return self.network(x) if here.calls <= WARM else self._record(here, x)

    def _record(self, here: Shape, x: Tensor) -> tuple[Tensor, ...]:
        wanted = self.network(x)
        here.x = x.clone()
        here.recording = self.capture(lambda: self.network(here.x))
        if here.recording.reason is not None:
            return self._give_up(wanted, here.recording.reason)
        here.x.zero_()  # what it reads must be what it is given
        for found, want in zip(self._replay(here, x), wanted, strict=True):
            if not torch.equal(found, want):
                return self._give_up(wanted, "its numbers were others than those of a call")
        return wanted

    def _replay(self, here: Shape, x: Tensor) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        if here.played is not None:
            stream.wait_event(here.played)
        here.x.copy_(x)
        here.recording.replay()
        made = tuple(each.clone() for each in here.recording.made)  # the next replay writes others there
        here.played = stream and stream.record_event()
        return made

    def _give_up(self, wanted: tuple[Tensor, ...], reason: str) -> tuple[Tensor, ...]:
        self.gave_up = True
        for each in self.shapes.values():
            if each.recording is not None:
                each.recording.free()
        self.shapes.clear()
        log.warning(
            "%s could not be recorded as a CUDA graph, and goes on without, slower: %s", self.name, reason
        )
        return wanted
