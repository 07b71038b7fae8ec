"""What stands for a network once it is recorded; the recorder here calls it again at every replay."""

from __future__ import annotations

import logging

import pytest
import torch

from nextvid_mcore.recording import first_reason
from nextvid_mcore.targets.replayed import WARM, Replayed


class Again:
    """What `recording.capture` returns, on the CPU; `off` is added at every replay."""

    freed = 0

    def __init__(self, work, off: float = 0.0, reason: str | None = None) -> None:
        self.work, self.off, self.made, self.reason = work, off, None if reason else work(), reason

    def free(self) -> None:
        Again.freed += 1

    def replay(self) -> None:
        for to, found in zip(self.made, self.work(), strict=True):
            to.copy_(found + self.off)


def recorder(off: float = 0.0):
    return lambda work: Again(work, off)


def network(x):
    return x.sum(1), 2 * x


def test_it_gives_what_the_network_gives_of_every_shape():
    calls = []

    def watched(x):
        calls.append(x.shape)
        return network(x)

    replayed = Replayed(watched, "it", recorder())
    kept = []
    for i in range(WARM + 4):
        for shape in ((3, 4), (2, 5)):
            x = torch.full(shape, float(i)).add_(torch.arange(shape[1]))
            kept.append((replayed(x), network(x)))
    assert not replayed.gave_up and len(replayed.shapes) == 2
    for found, wanted in kept:  # later replays have not written into what earlier ones returned
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_recording_that_reads_something_else_is_given_up(caplog):
    frozen = torch.ones(2, 3)
    replayed = Replayed(network, "it", lambda work: recorder()(lambda: network(frozen)))
    with caplog.at_level(logging.WARNING):
        for i in range(WARM + 3):
            x = torch.full((2, 3), float(i))
            assert torch.equal(replayed(x)[1], 2 * x)
    assert replayed.gave_up and not replayed.shapes
    assert [r.getMessage() for r in caplog.records] == [
        "it could not be recorded as a CUDA graph, and goes on without, slower: its numbers were others than "
        "those of a call"
    ]


@pytest.mark.parametrize("off", [1e-6, float("nan")])
def test_a_replay_that_is_off_by_a_bit_is_given_up(off):
    replayed = Replayed(network, "it", recorder(off))
    for i in range(WARM + 3):
        x = torch.full((2, 3), float(i))
        assert torch.equal(replayed(x)[1], 2 * x)
    assert replayed.gave_up


def test_a_recording_that_breaks_off_is_given_up(caplog):
    freed = Again.freed
    replayed = Replayed(network, "it", lambda work: Again(work, reason="ValueError: a wait for the device"))
    with caplog.at_level(logging.WARNING):
        for i in range(WARM + 2):
            x = torch.full((2, 3), float(i))
            assert torch.equal(replayed(x)[1], 2 * x)
    assert replayed.gave_up and "slower: ValueError: a wait for the device" in caplog.text
    assert Again.freed == freed + 1


def test_the_reason_is_that_of_the_work_and_not_of_the_recordings_end():
    try:
        try:
            raise ValueError("a wait for the device\nand more")
        except ValueError:
            raise RuntimeError("operation failed") from None
    except RuntimeError as error:
        assert first_reason(error) == "ValueError: a wait for the device"
