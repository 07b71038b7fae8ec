"""The manifest: a folder of parquet files, one row per video or image, that never has to fit in memory.

A file holds rows of one set (`k400-00003.parquet`) in row groups of equal size, so "item i of set s"
is arithmetic: which file, which row group, which row. Reading an item decompresses that one row group
(4096 rows, well under a megabyte) from the memory-mapped file. Parquet is compressed, so the mapping
alone would not keep rows out of memory; reading single row groups does. A process holds the list of
files, the footers of a few and a few row groups, whatever the number of rows. Only the list travels to
loader processes.

Footers carry what a reader must know beyond the schema (key `nextvid`): set, shard, whether the shard
is the last of its set, rows per group and class names. A relative path is relative to the manifest.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nextvid_mcore.config import ConfigError, require

KINDS = ("video", "image")
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("label", pa.int32()),  # -1: none
        ("frames", pa.int32()),  # -1: not probed
        ("fps", pa.float32()),  # 0: not probed, or an image
        ("set", pa.dictionary(pa.int16(), pa.string())),
    ]
)
ROWS_PER_GROUP = 4096
ROWS_PER_FILE = 2**20
OPEN_FILES = 16  # footers a process keeps: a megabyte each for a full file
OPEN_GROUPS = 16
FOOTER = b"nextvid"


class Item(NamedTuple):
    """One row."""

    path: str
    kind: str
    label: int = -1
    frames: int = -1
    fps: float = 0.0


@dataclass(frozen=True)
class SetTable:
    """Where the rows of one set lie."""

    name: str
    files: tuple[str, ...]
    ends: np.ndarray  # int64 [files]: rows in this file and all before it
    rows_per_group: int
    classes: tuple[str, ...] = ()  # names of the labels 0, 1, ..., where the set has them

    @property
    def rows(self) -> int:
        return int(self.ends[-1])


@dataclass
class Manifest:
    """`open` it once; `item(set, i)` reads one row. Pickles small, whatever the number of rows."""

    path: str
    sets: dict[str, SetTable]
    _files: OrderedDict[str, pq.ParquetFile] = field(default_factory=OrderedDict, repr=False)
    _groups: OrderedDict[tuple[str, int], pa.Table] = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Read the footers of a manifest folder (or of a single file of it)."""
        root = Path(path)
        require(root.exists(), f"no manifest at {root}; write one with tools/build_manifest.py")
        files = [root] if root.is_file() else sorted(root.glob("*.parquet"))
        require(len(files) > 0, f"{root} holds no .parquet file; write some with tools/build_manifest.py")
        found: dict[str, list[tuple[dict[str, Any], int, str]]] = {}
        for file in files:
            footer, rows = _read_footer(file)
            found.setdefault(footer["set"], []).append((footer, rows, str(file)))
        whole = not root.is_file()
        return cls(str(root), {name: _table(name, shards, whole) for name, shards in sorted(found.items())})

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.sets.values())

    def item(self, name: str, index: int) -> Item:
        """Row `index` of set `name`."""
        table = self.sets[name]
        if not 0 <= index < table.rows:
            raise IndexError(f"set {name} has {table.rows} items, no item {index}")
        shard = int(np.searchsorted(table.ends, index, side="right"))
        row = index - (int(table.ends[shard - 1]) if shard else 0)
        group, row = divmod(row, table.rows_per_group)
        rows = self._group(table.files[shard], group)
        path, kind, label, frames, fps = (column[row].as_py() for column in rows.columns)
        if not os.path.isabs(path):
            folder = os.path.dirname(table.files[shard])
            path = os.path.normpath(os.path.join(folder, path))
        return Item(path, kind, label, frames, fps)

    def _group(self, file: str, group: int) -> pa.Table:
        cached = self._groups.get((file, group))
        if cached is not None:
            self._groups.move_to_end((file, group))
            return cached
        reader = self._files.pop(file, None)
        if reader is None:
            reader = _open_parquet(Path(file))
        self._files[file] = reader
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        # use_threads=False: a loader process has one core, and its arrow threads would only cost memory
        rows = reader.read_row_group(group, columns=list(Item._fields), use_threads=False)
        self._groups[file, group] = rows
        if len(self._groups) > OPEN_GROUPS:
            self._groups.popitem(last=False)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "sets": self.sets, "_files": OrderedDict(), "_groups": OrderedDict()}


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file} cannot be read as parquet ({error}); build the manifest again") from None


def _read_footer(file: Path) -> tuple[dict[str, Any], int]:
    with _open_parquet(file) as reader:
        raw = (reader.metadata.metadata or {}).get(FOOTER)
        require(
            raw is not None, f"{file} was not written by tools/build_manifest.py; list its files and run that"
        )
        return json.loads(raw), reader.metadata.num_rows


def _table(name: str, shards: list[tuple[dict[str, Any], int, str]], whole: bool) -> SetTable:
    shards = sorted(shards, key=lambda shard: shard[0]["shard"])
    last = shards[-1][0]
    if whole:
        numbers = [footer["shard"] for footer, _, _ in shards]
        require(
            numbers == list(range(len(shards))) and last["last"],
            f"set {name} lacks a file: there are shards {numbers}"
            + ("" if last["last"] else ", and the last of them says that more follow")
            + "; copy the missing ones or build the manifest again",
        )
    sizes = {footer["rows_per_group"] for footer, _, _ in shards}
    require(len(sizes) == 1, f"set {name} mixes files of different builds; build the manifest again")
    return SetTable(
        name=name,
        files=tuple(file for _, _, file in shards),
        ends=np.cumsum([rows for _, rows, _ in shards], dtype=np.int64),
        rows_per_group=sizes.pop(),
        classes=tuple(last.get("classes", ())),
    )


def check_set_name(name: str) -> None:
    """A set's name is part of its files' names."""
    require(
        re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None,
        f"set name {name!r}: use letters, digits, dot, dash and underscore",
    )


class SetWriter:
    """Writes the files of one set; `close` (or leaving the `with`) finishes the last one."""

    def __init__(
        self,
        folder: str | Path,
        name: str,
        rows_per_file: int = ROWS_PER_FILE,
        rows_per_group: int = ROWS_PER_GROUP,
    ) -> None:
        check_set_name(name)
        require(
            rows_per_file % rows_per_group == 0,
            f"{rows_per_file} rows per file is not a multiple of {rows_per_group} rows per group",
        )
        self.folder, self.name = Path(folder), name
        self.rows_per_file, self.rows_per_group = rows_per_file, rows_per_group
        self.classes: tuple[str, ...] = ()  # may be set until `close`
        self.rows = 0
        self.files: list[Path] = []
        self._buffer: list[Item] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, items: Iterable[Item]) -> None:
        for item in items:
            if len(self._buffer) == self.rows_per_group:
                self._flush()
            self._buffer.append(item)
            self.rows += 1

    def _flush(self) -> None:
        """Write the buffer as one row group, in a new file where the open one is full."""
        written = self.rows - len(self._buffer)
        if written % self.rows_per_file == 0:
            self._finish(last=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files.append(self.folder / f"{self.name}-{len(self.files):05d}.parquet")
            self._writer = pq.ParquetWriter(
                self.files[-1],
                SCHEMA,
                compression="zstd",
                write_statistics=False,
                use_dictionary=["kind", "set"],
            )
        columns = list(zip(*self._buffer, strict=True)) + [(self.name,) * len(self._buffer)]
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
        self._writer.write_table(
            pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=self.rows_per_group
        )
        self._buffer.clear()

    def _finish(self, last: bool) -> None:
        if self._writer is None:
            return
        footer = {
            "set": self.name,
            "shard": len(self.files) - 1,
            "last": last,
            "rows_per_group": self.rows_per_group,
        }
        if last:
            footer["classes"] = list(self.classes)
        self._writer.add_key_value_metadata({FOOTER: json.dumps(footer).encode()})
        self._writer.close()
        self._writer = None

    def close(self) -> None:
        if self._buffer:
            self._flush()
        self._finish(last=True)

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
