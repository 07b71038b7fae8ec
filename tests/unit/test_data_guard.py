"""Bad files: said once, and a limit."""

from __future__ import annotations

import json
import logging

import pytest

from nextvid_mcore.data.guard import BadFileLog, BadShareGuard, DataError


def test_a_file_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = BadFileLog()
    with caplog.at_level(logging.WARNING, "nextvid.data"):
        log.add([("/a.mp4", "torn"), ("/b.mp4", "empty")])
        log.add([("/a.mp4", "torn")])
    assert len(caplog.messages) == 2
    assert "/a.mp4" in caplog.messages[0] and "torn" in caplog.messages[0]


def test_one_bad_sample_in_the_first_step_stops_nothing() -> None:
    guard = BadShareGuard(0.05, 100)
    guard.update(4, 1)
    for _ in range(24):
        guard.update(4, 0)
    assert guard.share == 0.01  # the window is full, and it is the first of it
    guard.update(4, 0)
    assert guard.share == 0


def test_a_missing_disk_stops_the_run_soon_and_names_files() -> None:
    guard = BadShareGuard(0.05, 100)
    with pytest.raises(DataError) as caught:
        for step in range(100):
            guard.update(2, 2, [(f"/disk/{step}.mp4", "No such file")])
    assert step == 2  # 6 bad of a window of 100
    for part in ("6.0%", "5.0%", "data.max_bad_share", "/disk/2.mp4 (No such file)"):
        assert part in str(caught.value)


def test_old_steps_leave_the_window() -> None:
    guard = BadShareGuard(0.05, 100)
    for _ in range(50):  # 5 bad of every 100: at the limit, never above it
        guard.update(20, 1)
    assert guard.share == 0.05
    with pytest.raises(DataError):
        guard.update(20, 2)


def test_the_limit_may_be_none_or_all() -> None:
    with pytest.raises(DataError):
        BadShareGuard(0.0, 10).update(5, 1)
    guard = BadShareGuard(1.0, 10)
    for _ in range(10):
        guard.update(5, 5)


def test_a_resumed_guard_stops_at_the_same_step() -> None:
    bad = [1, 0, 2, 0, 0, 3, 1, 0, 0, 4, 5, 0, 6, 6, 6]

    def stops(guard: BadShareGuard, first: int) -> int:
        for step in range(first, len(bad)):
            try:
                guard.update(8, bad[step])
            except DataError:
                return step
        return -1

    wanted = stops(BadShareGuard(0.2, 50), 0)
    assert wanted > 8
    for cut in range(1, wanted):
        guard = BadShareGuard(0.2, 50)
        for step in range(cut):
            guard.update(8, bad[step])
        resumed = BadShareGuard(0.2, 50)
        resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        assert stops(resumed, cut) == wanted
