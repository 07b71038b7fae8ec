"""The manifest: any row by arithmetic, bounded memory, clear errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nextvid_mcore.config import ConfigError
from nextvid_mcore.data import manifest as module
from nextvid_mcore.data.manifest import SCHEMA, Item, Manifest, SetWriter


def rows(name: str, count: int) -> list[Item]:
    return [
        Item(f"/{name}/file {i}.mp4", ("video", "image")[i % 2], i % 7 - 1, 10 * i, i / 2)
        for i in range(count)
    ]


def write(folder: Path, name: str, count: int) -> list[Item]:
    items = rows(name, count)
    with SetWriter(folder, name, rows_per_file=12, rows_per_group=4) as writer:
        writer.classes = ("a", "b")
        writer.add(items)
    return items


def test_every_row_of_every_set_is_found(tmp_path: Path) -> None:
    """33 rows are 3 files of 3 groups, the last of each short; 24 end exactly at a file's end."""
    wanted = {name: write(tmp_path, name, count) for name, count in (("b", 33), ("a", 24), ("one", 1))}
    manifest = Manifest.open(tmp_path)
    assert list(manifest.sets) == ["a", "b", "one"] and manifest.rows == 58
    assert [len(manifest.sets[name].files) for name in manifest.sets] == [2, 3, 1]
    assert manifest.sets["b"].classes == ("a", "b")
    for name, items in wanted.items():
        assert [manifest.item(name, i) for i in range(len(items))] == items
    for index in (-1, 24):
        with pytest.raises(IndexError, match="24 items"):
            manifest.item("a", index)


def test_files_are_plain_parquet_with_the_six_columns(tmp_path: Path) -> None:
    items = write(tmp_path, "s", 5)
    table = pq.read_table(tmp_path / "s-00000.parquet")
    assert table.schema.names == ["path", "kind", "label", "frames", "fps", "set"] == SCHEMA.names
    assert table.to_pylist() == [{**item._asdict(), "set": "s"} for item in items]


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    monkeypatch.setattr(module, "OPEN_GROUPS", 3)
    items = write(tmp_path, "s", 60)
    manifest = Manifest.open(tmp_path)
    for index in [*range(0, 60, 5), *range(59, -1, -7)]:
        assert manifest.item("s", index) == items[index]
        assert len(manifest._files) <= 2 and len(manifest._groups) <= 3


def test_a_copy_travels_without_rows_and_still_reads(tmp_path: Path) -> None:
    items = write(tmp_path, "s", 60)
    manifest = Manifest.open(tmp_path)
    before = pickle.dumps(manifest)
    assert manifest.item("s", 30) == items[30]
    assert pickle.dumps(manifest) == before
    assert pickle.loads(before).item("s", 59) == items[59]


def test_relative_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    with SetWriter(tmp_path / "m", "s") as writer:
        writer.add([Item("../clips/x.mp4", "video")])
    assert Manifest.open(tmp_path / "m").item("s", 0).path == str(tmp_path / "clips/x.mp4")


def test_one_file_opens_alone(tmp_path: Path) -> None:
    items = write(tmp_path, "s", 30)
    manifest = Manifest.open(tmp_path / "s-00001.parquet")
    assert manifest.rows == 12 and manifest.item("s", 0) == items[12]


def test_what_is_not_a_manifest_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no manifest at .*nowhere.*build_manifest"):
        Manifest.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no .parquet file"):
        Manifest.open(tmp_path)
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="x.parquet was not written by"):
        Manifest.open(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="x.parquet cannot be read as parquet"):
        Manifest.open(tmp_path)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_missing_file_is_said(tmp_path: Path, shard: int) -> None:
    write(tmp_path, "s", 33)
    (tmp_path / f"s-0000{shard}.parquet").unlink()
    with pytest.raises(ConfigError, match="set s lacks a file"):
        Manifest.open(tmp_path)


def test_a_set_name_that_cannot_be_a_file_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a/b'"):
        SetWriter(tmp_path, "a/b")
