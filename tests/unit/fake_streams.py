"""CUDA streams that only keep account: behind what does a piece of work run?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch


class FakeEvent:
    def __init__(self, seen: frozenset[str]) -> None:
        self.seen = seen


class FakeStream:
    """`seen`: what has ended when the next piece of work begins here."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority, self.seen = priority, frozenset()

    def wait_event(self, event: FakeEvent) -> None:
        self.seen |= event.seen

    def wait_stream(self, other: FakeStream) -> None:
        self.seen |= other.seen

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.seen)


class FakeCuda:
    """A current stream, and of every piece of work what it came behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.behind = FakeStream(), {}
        self.streams: dict[str, FakeStream] = {}
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._stream)

    @contextlib.contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, name: str) -> None:
        """A piece of work on the current stream."""
        self.behind[name] = self.current.seen
        self.streams[name] = self.current
        self.current.seen |= {name}


class Made:
    """A tensor that a stream made, as far as the allocator is concerned."""

    def __init__(self) -> None:
        self.users: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.users.append(stream)
