"""Build a manifest: list the files of each set, open each one if asked, write parquet.

Probing a large set takes hours, so it is cut into chunks of about a thousand files, done by a pool of
processes; each finished chunk is a file under OUT/.probed and is not done again, except for what was
bad in it. Where chunks begin depends on the names alone (as rsync cuts blocks), so a file that joins
or leaves the set costs its own chunk and no other. A decoder that crashes takes its process along: the
chunks in flight are then repeated alone, file by file where needed, and the file is reported.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.data import decode
from nextvid_mcore.data.manifest import Item, SetWriter
from nextvid_mcore.data.sources import Entry, Source
from nextvid_mcore.data.workers import start_worker

CHUNK = 1024  # files of a chunk, on average; at most four times as many

MAX_CLASSES = 10_000  # names of more folders than this are not classes, and would swell the footer


class Probed(NamedTuple):
    """What opening a file found. `reason` is empty for a good one."""

    frames: int = -1
    fps: float = 0.0
    reason: str = ""


@dataclass
class Report:
    """What became of one set."""

    name: str
    kinds: Counter[str] = field(default_factory=Counter)  # rows written, by kind
    held_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # unreadable, too short, of unknown kind
    seconds: float = 0.0  # of probed video


@dataclass(frozen=True)
class Build:
    """The settings of one call."""

    out: Path
    probe: bool = False
    min_frames: int = 2  # probed videos with fewer are left out
    holdout: float = 0.0
    holdout_out: Path | None = None
    relative: bool = False  # store paths relative to the manifest
    jobs: int = 1

    def __post_init__(self) -> None:
        require(0 <= self.holdout < 1, f"--holdout {self.holdout}: give a share from 0 to below 1")
        require(self.jobs >= 1, f"--jobs {self.jobs}: give 1 or more")
        require(self.min_frames >= 1, f"--min-frames {self.min_frames}: give 1 or more")
        same = bool(self.holdout) and os.path.realpath(self.held) == os.path.realpath(self.out)
        require(not same, f"--holdout-out {self.held} is --out itself; name another folder")

    @property
    def held(self) -> Path:
        return self.holdout_out or self.out.with_name(self.out.name + "-val")

    def stale(self, names: Iterable[str]) -> list[str]:
        """Sets of the held-out folder that this call, without a share to hold out, put into OUT whole."""
        if self.holdout:
            return []
        return sorted(
            {name for name in names if any(self.held.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].parquet"))}
        )

    def run(self, sources: list[Source], progress: Callable[[str, int, int], None]) -> list[Report]:
        """Build all sets. `progress(set, files done, files in all)` is called now and then."""
        names = list(dict.fromkeys(source.name for source in sources))
        fresh = [folder / ".new" for folder in ([self.out, self.held] if self.holdout else [self.out])]
        for folder in fresh:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                reason = f"{folder.parent} cannot be written ({error.strerror}); name another folder"
                raise ConfigError(reason) from None
        with open(fresh[0] / "rejected.tsv", "w", encoding="utf-8", errors="surrogateescape") as rejected:
            rejected.write("set\twhat\treason\tpath\n")
            reports = [
                self._set(name, [s for s in sources if s.name == name], rejected, progress) for name in names
            ]
        require(
            not self.holdout or any(report.held_out for report in reports),
            f"--holdout {self.holdout} holds nothing out of {sum(r.kinds.total() for r in reports)} files; "
            "raise it",
        )
        for folder in fresh:  # whole sets at once: a build that was stopped has changed nothing
            for name in names:
                for old in folder.parent.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].parquet"):
                    old.unlink()
            for file in sorted(folder.iterdir()):
                os.replace(file, folder.parent / file.name)
            folder.rmdir()
        return reports

    def _set(self, name: str, sources: list[Source], rejected, progress) -> Report:  # noqa: ANN001
        report = Report(name)
        classes = tuple(sorted({label for source in sources for label in source.classes()}))
        spool = self.out / ".new" / f"{name}.list"
        total = _spool(spool, (entry for source in sources for entry in source.entries(classes)))
        require(
            total > 0,
            f"set {name}: no video or image files in {', '.join(str(source.path) for source in sources)}",
        )
        with ExitStack() as stack:
            writer = stack.enter_context(SetWriter(self.out / ".new", name))
            held = stack.enter_context(SetWriter(self.held / ".new", name)) if self.holdout else None
            for each in (writer, held) if held else (writer,):
                each.classes = classes if len(classes) <= MAX_CLASSES else ()
            done = 0
            for entries, probed in self._probed(name, _chunks(_despool(spool))):
                for entry, found in zip(entries, probed, strict=True):
                    what, reason = self._verdict(entry, found)
                    if what:
                        report.rejected[what] += 1
                        rejected.write(f"{name}\t{what}\t{' '.join(reason.split())}\t{entry.path}\n")
                        continue
                    to_held = held is not None and _share(entry.path) < self.holdout
                    folder = self.held if to_held else self.out
                    path = os.path.relpath(entry.path, folder) if self.relative else entry.path
                    item = Item(path, entry.kind, entry.label, found.frames, found.fps)
                    (held if to_held else writer).add([item])
                    report.kinds[entry.kind] += 1
                    report.held_out += to_held
                    report.seconds += found.frames / found.fps if found.fps > 0 else 0
                done += len(entries)
                progress(name, done, total)
        spool.unlink()
        kept = sum(report.kinds.values())
        require(kept > 0, f"set {name}: none of its {total} files can be used; {self._example(rejected)}")
        require(
            kept > report.held_out,
            f"set {name}: all its {kept} files were held out; lower --holdout {self.holdout}",
        )
        return report

    def _verdict(self, entry: Entry, found: Probed) -> tuple[str, str]:
        """("", "") for a file to keep, else what is wrong with it and why."""
        if entry.kind is None:
            return "unknown", "neither a video nor an image by its extension; give the kind with the set"
        if not entry.path.isprintable() and "\udc80" <= max(entry.path) <= "\udcff":
            return "unreadable", "the name is not UTF-8"
        if found.reason:
            return "unreadable", found.reason
        if entry.kind == "video" and 0 <= found.frames < self.min_frames:
            return "short", f"{found.frames} frames, fewer than {self.min_frames}"
        return "", ""

    @staticmethod
    def _example(rejected) -> str:  # noqa: ANN001
        rejected.flush()
        with open(rejected.name, encoding="utf-8", errors="replace") as lines:
            _, what, reason, path = lines.readlines()[-1].rstrip("\n").split("\t", 3)
        return f"the last one is {path} ({what}: {reason})"

    def _probed(self, name: str, chunks: Iterable[list[Entry]]) -> Iterator[tuple[list[Entry], list[Probed]]]:
        """Chunks in order, each with what probing found."""
        if not self.probe:
            yield from ((entries, [Probed()] * len(entries)) for entries in chunks)
            return
        parts = self.out / ".probed" / name
        parts.mkdir(parents=True, exist_ok=True)
        pool = Pool(self.jobs)
        waiting: deque[tuple[list[Entry], Handle]] = deque()
        try:
            for entries in chunks:
                job = (str(parts / f"{_key(entries)}.json"), [(e.path, e.kind) for e in entries])
                waiting.append((entries, pool.submit(job)))
                if len(waiting) > 2 * self.jobs:
                    entries, handle = waiting.popleft()
                    yield entries, pool.result(handle)
            for entries, handle in waiting:
                yield entries, pool.result(handle)
        finally:
            pool.close()


Job = tuple[str, list[tuple[str, str | None]]]  # the chunk's result file; (path, kind) of its files
Work = Callable[[str, list[tuple[str, str | None]]], list[Probed]]
Handle = tuple[Job, ProcessPoolExecutor, Future]


class Pool:
    """A process pool that outlives a crash of the native decoder in one of its processes."""

    def __init__(self, jobs: int, work: Work | None = None) -> None:
        self.jobs, self.work = jobs, work or probe_chunk
        self._pool = self._start(jobs)

    @staticmethod
    def _start(jobs: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker)

    def submit(self, job: Job) -> Handle:
        try:
            return job, self._pool, self._pool.submit(self.work, *job)
        except BrokenProcessPool:
            self._restart()
            return job, self._pool, self._pool.submit(self.work, *job)

    def _restart(self) -> None:
        self._pool.shutdown()
        self._pool = self._start(self.jobs)

    def result(self, handle: Handle) -> list[Probed]:
        job, pool, future = handle
        try:
            return future.result()
        except BrokenProcessPool:
            if pool is self._pool:
                self._restart()
        part, files = job
        found = self._alone(part, files)
        if found is None:  # this is the chunk that holds the file
            found = []
            for file in files:
                found += self._alone("", [file]) or [Probed(reason="the decoder crashed")]
            _write_part(Path(part), files, found)
        return found

    def _alone(self, part: str, files: list[tuple[str, str | None]]) -> list[Probed] | None:
        """In a process of its own; None where that crashes too."""
        with self._start(1) as pool:
            try:
                return pool.submit(self.work, part, files).result()
            except BrokenProcessPool:
                return None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def probe_chunk(part: str, files: list[tuple[str, str | None]]) -> list[Probed]:
    """Open every file that `part` doesn't already know as good; write `part` ("": nowhere)."""
    known = {}
    if part and os.path.exists(part):
        with open(part, encoding="ascii") as file:
            known = {path: Probed(*rest) for path, *rest in json.load(file)}
    found, news = [], False
    for path, kind in files:
        result = known.get(path)
        if result is None or result.reason:
            result, news = _probe(path, kind), True
        found.append(result)
    if part and news:
        _write_part(Path(part), files, found)
    return found


def _probe(path: str, kind: str | None) -> Probed:
    if kind is None:
        return Probed()
    try:
        return Probed(*decode.probe(path, kind))
    except decode.BadFile as error:
        return Probed(reason=error.reason)


def _write_part(part: Path, files: list[tuple[str, str | None]], found: list[Probed]) -> None:
    rows = [(path, *result) for (path, _), result in zip(files, found, strict=True)]
    temporary = part.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows), encoding="ascii")
    os.replace(temporary, part)


def _spool(path: Path, entries: Iterable[Entry]) -> int:
    """Write the listing to disk: it may be larger than memory, and its length is wanted first."""
    total = 0
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for entry in entries:
            if "\n" in entry.path or "\r" in entry.path:
                raise ConfigError(f"{entry.path!r}: a file name with a line break; rename it")
            file.write(f"{entry.kind or ''}\t{entry.label}\t{entry.path}\n")
            total += 1
    return total


def _despool(path: Path) -> Iterator[Entry]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            kind, label, name = line.rstrip("\n").split("\t", 2)
            yield Entry(name, kind or None, int(label))


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == 4 * CHUNK or zlib.crc32(_bytes(entry.path)) % CHUNK == 0:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _key(entries: list[Entry]) -> str:
    text = "\n".join(f"{entry.kind}\t{entry.path}" for entry in entries)
    return hashlib.blake2b(_bytes(text), digest_size=16).hexdigest()


def _share(path: str) -> float:
    """A number in [0, 1) that belongs to this path: a file stays held out when others join its set."""
    return int.from_bytes(hashlib.blake2b(_bytes(path), digest_size=8).digest(), "little") / 2**64


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")
