"""How a run meets signals; through the whole program: tests/distributed/test_pretrain.py, test_crash.py."""

from __future__ import annotations

import os
import pty
import signal
from collections.abc import Iterator

import pytest

from nextvid_mcore.evaluation import stopping
from nextvid_mcore.training import told
from nextvid_mcore.training.progress import Progress
from nextvid_mcore.training.told import Told


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """As in a terminal, also where the tests run under nohup."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in told.TERMINAL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*told.SIGNALS, *told.TERMINAL])
def test_the_first_one_counts_and_handlers_come_back(number: int, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(number)
    hears = Told(says=True)
    hears.listen()
    try:
        os.kill(os.getpid(), number)
        assert hears.number == number
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's when it dies: the run still saves
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same wish
        assert hears.number == number
    finally:
        hears.close()
    assert signal.getsignal(number) == before
    assert ("then the run is saved" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_ctrl_c_again_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "TWICE", -1.0)
    hears = Told(says=False)
    hears.listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        hears.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_reads_any_more(terminal: bool) -> None:
    """`2>&1 | tee` ends with the same Ctrl-C, a closed terminal takes no line: the run saves all the same."""
    theirs, ours = pty.openpty() if terminal else os.pipe()
    stream, err = os.fdopen(ours, "w"), os.dup(2)
    progress, hears = Progress(9, 0, 1, True, 0, stream), Told(says=True)
    os.close(theirs)
    os.dup2(ours, 2)
    hears.listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert hears.number == signal.SIGINT
        with stopping.Stop() as probe, probe.gently():
            os.kill(os.getpid(), signal.SIGINT)
            assert probe.asked
    finally:
        hears.close()
        os.dup2(err, 2)
        os.close(err)
    row = {"step": 1, "stage": "", "loss": 1.0, "loss_flow": 1.0, "loss_align": None, "clips_per_s": 1.0}
    progress.step(row | {"lr": 1.0, "skipped": 0})
    progress.say("SIGINT: saved")
    progress.close()
    print("a line more", file=stream, flush=True)
    stream.close()  # as at the interpreter's exit, which would make the exit code 120


def test_nohup_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in told.TERMINAL}
    hears = Told(says=False)
    hears.listen()
    try:
        for number in told.TERMINAL:
            os.kill(os.getpid(), number)
        assert hears.number == 0
    finally:
        hears.close()
        for number, handler in before.items():
            assert signal.signal(number, handler) is signal.SIG_IGN
