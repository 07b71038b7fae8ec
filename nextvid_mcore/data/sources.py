"""What files a data set has: a folder, walked, or a list as V-JEPA's csv files are, read line by line.

Both are generators: 350 million names never stand in memory together.

A folder's label is the number of its first-level subfolder in sorted order (ImageFolder's rule); files
directly in the folder have none. A list has "path label" on each line, as V-JEPA and V-JEPA 2 write it;
the path may contain spaces and quotes round it; `::`, a comma or a tab may stand for the space; the
label may be missing. Relative paths are relative to the list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.data.manifest import KINDS, check_set_name

EXTENSIONS = {
    "video": {
        ".mp4",
        ".webm",
        ".mkv",
        ".avi",
        ".mov",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".flv",
        ".ts",
        ".wmv",
        ".3gp",
    },
    "image": {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"},
}
LISTS = {".csv", ".txt", ".tsv", ".lst"}
LINE = re.compile(r"(?P<path>.+?)(?:(?:\s*(?:::|,)\s*|\s+)(?P<label>-?\d+))?")


class Entry(NamedTuple):
    """One file of a set, as found. `kind` is None where neither the flag nor the extension tells."""

    path: str
    kind: str | None
    label: int


@dataclass(frozen=True)
class Source:
    """One folder or list that belongs to a set."""

    name: str
    path: Path
    kind: str | None  # None: by extension

    @classmethod
    def parse(cls, text: str) -> Source:
        """name=path or name=path:kind"""
        name, equals, path = text.partition("=")
        kind = None
        head, colon, tail = path.rpartition(":")
        if colon and tail in KINDS:
            path, kind = head, tail
        require(bool(name and equals and path), f"--set {text}: write it as name=path or name=path:kind")
        source = cls(name, Path(path).expanduser().absolute(), kind)
        check_set_name(name)
        hint = f"; KIND is {' or '.join(sorted(KINDS, reverse=True))}" if colon else ""
        require(source.path.exists(), f"--set {text}: there is no {source.path}{hint}")
        require(
            source.path.is_dir() or source.path.suffix.lower() in LISTS,
            f"--set {text}: give a folder or a list of files ({', '.join(sorted(LISTS))})",
        )
        return source

    def classes(self) -> tuple[str, ...]:
        """Names of the labels, where folders give them."""
        if not self.path.is_dir():
            return ()
        with os.scandir(self.path) as entries:
            return tuple(sorted(e.name for e in entries if e.is_dir() and self._enters(self.path, e.name)))

    def entries(self, classes: tuple[str, ...]) -> Iterator[Entry]:
        """Every file in a fixed order. `classes`: of the whole set, which may have several sources."""
        yield from self._walk(classes) if self.path.is_dir() else self._read()

    def _walk(self, classes: tuple[str, ...]) -> Iterator[Entry]:
        numbers = {name: number for number, name in enumerate(classes)}
        for folder, folders, files in os.walk(self.path, onerror=_raise, followlinks=True):
            folders[:] = sorted(name for name in folders if self._enters(folder, name))
            top = os.path.relpath(folder, self.path).split(os.sep)[0]
            for name in sorted(files):
                kind = kind_of(name)
                if not name.startswith(".") and kind is not None and self.kind in (None, kind):
                    yield Entry(os.path.join(folder, name), kind, numbers.get(top, -1))

    def _enters(self, folder: str | Path, name: str) -> bool:
        """Not what is hidden, nor a link back to where the walk stands: all files would be listed again and
        again, until the system says that there are too many links."""
        path = os.path.join(folder, name)
        if name.startswith("."):
            return False
        if not os.path.islink(path):
            return True
        there, steps = os.path.realpath(path), Path(folder).relative_to(self.path).parts
        on_the_way = (os.path.realpath(self.path.joinpath(*steps[:n])) for n in range(len(steps) + 1))
        return all(os.path.commonpath([there, place]) != there for place in on_the_way)

    def _read(self) -> Iterator[Entry]:
        # -sig: editors of tables put a mark before the first line, which is no part of a path
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                match = LINE.fullmatch(line.strip())
                path = match["path"].strip().strip("\"'") if match else ""
                if not path:
                    raise ConfigError(f'{self.path}, line {number}: {line.strip()!r} is not "path label"')
                label = int(match["label"] or -1)
                require(abs(label) < 2**31, f"{self.path}, line {number}: label {label} is beyond 32 bits")
                yield Entry(os.path.normpath(self.path.parent / path), self.kind or kind_of(path), label)


def kind_of(path: str) -> str | None:
    """video, image or None, by the file's extension."""
    extension = os.path.splitext(path)[1].lower()
    return next((kind for kind in KINDS if extension in EXTENSIONS[kind]), None)


def _raise(error: OSError) -> None:
    raise ConfigError(f"cannot list {error.filename}: {error.strerror}; check its permissions")
