"""Ends a run that hangs or has lost a rank, with a message that says which rank, its role, and where.

Every rank says which part of a step it enters (`enter`, an assignment). A thread of each rank keeps a small
file OUT/watch/rank00003.json up to date with it: the step, the part, and the call that the main thread
stands in. A rank that stays in one part for `parallel.timeout` seconds reads everyone's file: a rank whose
file no longer changes is dead or stopped, else the one that has entered the fewest parts is behind. It
says so and ends its process, and the others follow: within `parallel.timeout` plus `MARGIN` seconds.

Files, since a collective or the store may be what hangs, and since a stopped rank can still be read.
What is compared between ranks is whether numbers change, never clocks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # so that importing this costs nothing
    from nextvid_mcore.parallel.groups import RoleGroups

EXIT_LOST = 6
MARGIN = 15.0  # seconds from the timeout to the end of the last rank that can still run
COLLECTIVE_SLACK = 60.0  # collectives give up later than the watchdog, which knows more
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


@dataclass(frozen=True)
class Place:
    """Where a rank is: part `count` since it started, named `part`, of step `step`."""

    count: int = 0
    part: str = "starting"
    step: int = 0
    progress: int = 0  # signs of life inside a long part


_place = Place()


def enter(part: str, step: int | None = None) -> None:
    """This rank begins `part`; `step` from here on. All ranks must enter the same parts in one order."""
    global _place
    _place = Place(_place.count + 1, part, _place.step if step is None else step)


def progress() -> None:
    """The part goes on: some ranks may call this more often than others."""
    global _place
    _place = replace(_place, progress=_place.progress + 1)


def role_label(role: str, groups: RoleGroups) -> str:
    """'encoder, tensor 0, pipeline 1, data 0'"""
    return f"{role}, tensor {groups.tensor_rank}, pipeline {groups.pipeline_rank}, data {groups.data_rank}"


def collective_timeout(timeout: float) -> float:
    """What process groups are made with."""
    return timeout + COLLECTIVE_SLACK


def _standing() -> str:
    """The call that the main thread is in, and the line of this package that led there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    call = line = ""
    while frame is not None and not line:
        code = frame.f_code
        if code.co_filename == __file__:  # this rank's own diagnosis
            frame = frame.f_back
            continue
        if not call and code.co_name not in ("wrapper", "wrapped", "inner", "_fn", "<lambda>"):
            call = code.co_name
        if code.co_filename.startswith(_PACKAGE):
            line = f"{code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{call} at {line}" if line else call


def _process_state(record: dict[str, Any]) -> str:
    """'gone', 'stopped' or '' (running, or on another host)."""
    if record["host"] != socket.gethostname():
        return ""
    try:
        state = Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone" if Path("/proc/self").exists() else ""
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "")


class Watchdog:
    """Watches over this rank from `start` to `stop`."""

    def __init__(self, folder: Path, rank: int, world: int, label: str, timeout: float) -> None:
        """folder: the run's; label: role and place of this rank in it."""
        self.folder, self.rank, self.world, self.label = folder / "watch", rank, world, label
        self.timeout, self.interval = timeout, min(1.0, timeout / 8)
        self.verdict = self.folder / "verdict"  # made by the rank that speaks for all
        self._beats = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.verdict.unlink(missing_ok=True)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """This rank has ended by itself: no file says so."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._path(self.rank).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            pass  # others are still there

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05d}.json"

    def _beat(self) -> None:
        self._beats += 1
        record = asdict(_place) | {
            "beat": self._beats,
            "at": _standing(),
            "label": self.label,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        scratch = self._path(self.rank).with_suffix(".tmp")
        try:
            scratch.write_text(json.dumps(record))
            scratch.replace(self._path(self.rank))
        except OSError:
            pass  # a full disk is the checkpoint's to report

    def _watch(self) -> None:
        place, waited, last = _place, 0.0, time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            waited += min(now - last, 2 * self.interval)  # a job that was suspended as a whole isn't late
            last = now
            if _place != place:
                place, waited = _place, 0.0
            self._beat()
            if self.verdict.exists():
                self._end(None)
            if waited >= self.timeout:
                self._end(self.diagnosis())

    def peer_lost(self) -> None:
        """A collective has failed on this rank: if that is because another rank is gone, say so and end.

        Returns where every other rank is well: the failure is then this rank's own.
        """
        if self.world > 1:
            found = self.diagnosis(only_lost=True)
            if found or self.verdict.exists():
                self._end(found)

    def _end(self, message: str | None) -> NoReturn:
        """End this process at once, loader processes with it; the first rank to come here speaks."""
        if message is not None:
            try:
                with open(self.verdict, "x") as file:
                    file.write(message + "\n")
                print(f"nextvid_mcore [rank {self.rank}]: {message}", file=sys.stderr, flush=True)
            except FileExistsError:
                message = None
            except OSError:
                print(f"nextvid_mcore [rank {self.rank}]: {message}", file=sys.stderr, flush=True)
        if message is None:
            time.sleep(1.0)  # a launcher ends all as soon as one has ended: first the speaker
        os._exit(EXIT_LOST)

    def _read(self) -> dict[int, dict[str, Any] | None]:
        """Every rank's file; None where it has ended by itself."""
        found: dict[int, dict[str, Any] | None] = {}
        for rank in range(self.world):
            try:
                found[rank] = json.loads(self._path(rank).read_text())
            except (OSError, ValueError):
                found[rank] = None
        return found

    def diagnosis(self, only_lost: bool = False) -> str | None:
        """One message: who is lost or behind, and where everyone is.

        only_lost: None where every rank is there, and no wait for one whose process is seen to be gone.
        """
        before = self._read()
        gone = any(r is not None and _process_state(r) == "gone" for r in before.values())
        if not (only_lost and gone):
            for _ in range(3):  # the watching thread may be this one, so beat here
                time.sleep(max(self.interval, 0.5))
                if threading.current_thread() is self._thread:
                    self._beat()
        after = self._read()
        lost: dict[int, str] = {}
        for rank, record in after.items():
            old = before[rank]
            if rank == self.rank:
                continue
            if record is None or old is None:
                if old is None:
                    lost[rank] = f"rank {rank} has ended; its own message says why"
                continue
            state = _process_state(record)
            if state == "gone":
                lost[rank] = f"{_name(rank, record)} has died, last seen {_where(record, 'in')}"
            elif record["beat"] == old["beat"] and not (only_lost and gone):
                why = "is stopped" if state == "stopped" else "does not answer"
                lost[rank] = f"{_name(rank, record)} {why}, last seen {_where(record, 'in')}"
        if only_lost and not lost:
            return None
        there = {rank: r for rank, r in after.items() if r is not None and rank not in lost}
        if lost:
            said = "; ".join(lost.values())
        else:
            said, there = self._behind(there)
        head = "a rank is lost" if only_lost else f"no progress for {self.timeout:g} s"
        return f"{head}: {said}.{_waiting(there)} The same command goes on from the last checkpoint"

    def _behind(self, there: dict[int, dict[str, Any]]) -> tuple[str, dict[int, dict[str, Any]]]:
        """Who has entered the fewest parts, and the others."""
        least = min(record["count"] for record in there.values())
        behind = {rank: record for rank, record in there.items() if record["count"] == least}
        if len(behind) == len(there) > 1:
            return "all ranks are there and in the same part", there
        said = "; ".join(f"{_name(rank, r)} is behind, {_where(r, 'in')}" for rank, r in behind.items())
        return said, {rank: record for rank, record in there.items() if rank not in behind}


def _name(rank: int, record: dict[str, Any]) -> str:
    return f"rank {rank} ({record['label']}; process {record['pid']} on {record['host']})"


def _where(record: dict[str, Any], preposition: str) -> str:
    return f"{preposition} {record['part']} of step {record['step']} ({record['at']})"


def _waiting(there: dict[int, dict[str, Any]]) -> str:
    """' Rank(s) 0, 2 wait in ...', a part for every place."""
    places = defaultdict(list)
    for rank, record in there.items():
        places[_where(record, "in")].append(str(rank))
    said = [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} {place}" for place, ranks in places.items()
    ]
    return f" Waiting: {'; '.join(said)}." if said else ""
