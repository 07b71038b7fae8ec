"""How a run meets signals; through the whole program: tests/distributed/test_pretrain.py, test_crash.py."""

from __future__ import annotations

import os
import signal

import pytest

from nextvid_mcore.training import told
from nextvid_mcore.training.told import Told


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
