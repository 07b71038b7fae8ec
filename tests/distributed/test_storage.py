"""Checkpoints through the whole program: layouts, asynchronous saving, full disks, damage, strangers."""

# ruff: noqa: F811  (the fixture `data` is test_pretrain's)

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import shutil
import signal
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import run, shared
from small import build, config, drawn_step, snapshot
from test_checkpoint import forge, load_and_go_on, loading_fails
from test_pretrain import (
    close,
    data,  # noqa: F401  (a fixture)
    pretrain,
    rows,
    same_run,
    words,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.training import checkpoint, manifest, saving
from nextvid_mcore.training.manifest import CheckpointError
from nextvid_mcore.training.metrics import read


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read without megatron-core."""
    reader = dcp.FileSystemReader(folder)
    kinds = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def spoken(argvs: list[list[str]], full_disk: bool = False) -> list[tuple[int, str]]:
    """Codes of several runs, and all they print. full_disk: no file may grow beyond 100 kB."""
    out = []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if full_disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        for argv in argvs:
            text = io.StringIO()
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                codes = pretrain([argv])
            out.append((codes[0], text.getvalue()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return out


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory) -> Path:
    """An unbroken run on one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert shared(1).run(pretrain, [words(data, out)]) == [[0]]
    return out


def test_tensor_2_then_pipeline_2_data_2_then_one_rank(data: Path, whole: Path, tmp_path: Path):
    """Losses, held-out losses (of the EMA too) and the last weights, moments and EMA are one rank's."""
    out = tmp_path / "run"
    first = words(data, out, "--parallel.encoder.tensor 2 --train.steps 2")
    second = words(data, out, "--parallel.encoder.pipeline 2 --parallel.encoder.data 2 --train.steps 4")
    assert shared(2).run(pretrain, [first], timeout=300) == [[0]] * 2
    assert run(pretrain, 4, [second], timeout=300) == [[0]] * 4
    assert shared(1).run(pretrain, [words(data, out)], timeout=300) == [[0]]
    for file in ("metrics.jsonl", "eval.jsonl"):
        found, expected = rows(out / file), rows(whole / file)
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert close(mine, theirs), (mine, theirs)
    start, mine, theirs = (tensors(p) for p in (
        whole / "checkpoints" / "step_00000002",
        out / "checkpoints" / "step_00000006",
        whole / "checkpoints" / "step_00000006",
    ))  # fmt: skip
    assert mine.keys() == theirs.keys() and any(".ema." in name for name in mine)
    for name, expected in theirs.items():
        moved = (expected - start[name]).norm()
        assert (mine[name] - expected).norm() <= 1e-3 * moved + 1e-7 * expected.norm(), name


def test_an_asynchronous_run_is_the_synchronous_one(data: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    argv = words(data, out, "--checkpoint.asynchronous")
    assert shared(1).run(pretrain, [argv]) == [[0]]
    same_run(whole, out)
    for folder in sorted((whole / "checkpoints").iterdir()):
        mine, theirs = tensors(out / "checkpoints" / folder.name), tensors(folder)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for path in (whole, out):
        saved = [row for row in read(path / "metrics.jsonl") if "save_seconds" in row]
        assert [row["step"] for row in saved] == [2, 4, 6]
        assert all(row["save_seconds"] > 0 and row["save_host_gib"] >= 0 for row in saved)
    assert sum("save_background_seconds" in row for row in read(out / "metrics.jsonl")) == 3


def save_while_training(folder: str, failing: bool) -> tuple:
    """A step is taken while the save is held up. What each moment looked like."""
    _, optimizers = build(Layout(data=2))
    saver = saving.Saver(folder, config(), optimizers, asynchronous=True)
    drawn_step(optimizers, 0)
    saver.begin(1, 8)
    saver.wait()
    before, go, costs = snapshot(optimizers), threading.Event(), {}
    fingerprint = manifest.fingerprint

    def held_up(path):
        go.wait(60)
        if failing:
            raise OSError(28, "No space left on device")
        return fingerprint(path)

    manifest.fingerprint = held_up
    try:
        saver.begin(2, 16, note=costs.update)
        noted = dict(costs)
        drawn_step(optimizers, 1)  # training goes on, and changes every tensor
        during = saver.poll(), sorted(p.name for p in Path(folder).iterdir())
        go.set()
        try:
            after, error = saver.wait(), ""
        except CheckpointError as caught:
            after, error = None, str(caught)
    finally:
        manifest.fingerprint = fingerprint
    saver.begin(3, 24)  # and the next one works
    return before, during, after, error, noted, costs, saver.wait()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path):
    ranks = shared(2).run(save_while_training, str(tmp_path), False)
    assert [r[2] for r in ranks] == [tmp_path / "step_00000002"] * 2
    for _, during, _, _, _, _, last in ranks:
        assert during == (None, [".step_00000002.partial", "step_00000001"])
        assert last == tmp_path / "step_00000003"
    noted, costs = ranks[0][4], ranks[0][5]
    assert noted.keys() == {"save_seconds", "save_host_gib"}
    assert costs.keys() == noted.keys() | {"save_background_seconds"}
    loaded = shared(2).run(load_and_go_on, str(tmp_path / "step_00000002"), Layout(data=2))
    for rank, mine in zip(loaded, ranks, strict=True):
        for old, new in zip(mine[0], rank[1], strict=True):
            assert torch.equal(old[3], new[3]), old[0]


def test_a_save_that_fails_in_the_background_ends_on_all_ranks(tmp_path: Path):
    for _, _, after, error, _, _, last in shared(2).run(save_while_training, str(tmp_path), True):
        assert after is None and "No space left on device" in error
        assert f"the last whole one is {tmp_path / 'step_00000001'}" in error
        assert last == tmp_path / "step_00000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def die_while_writing(folder: str, moment: str) -> None:
    _, optimizers = build(Layout(data=2))
    saver = saving.Saver(folder, config(), optimizers, keep=1, asynchronous=True)
    saver.begin(1, 8)
    saver.wait()
    drawn_step(optimizers, 0)

    def killed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if torch.distributed.get_rank() == 1:
        owner, name = {
            "tensors": (saving.filesystem_async.FileSystemWriterAsync, "write_preloaded_data"),
            "checksums": (manifest, "fingerprint"),
        }[moment]
        setattr(owner, name, staticmethod(killed) if isinstance(owner, type) else killed)
    saver.begin(2, 16)
    saver.wait()


@pytest.mark.parametrize("moment", ["tensors", "checksums"])
def test_killed_while_writing_in_the_background(tmp_path: Path, moment: str):
    run(die_while_writing, 2, str(tmp_path), moment, check=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step_00000002.partial", "step_00000001"]
    assert shared(1).run(load_and_go_on, str(tmp_path / "step_00000001"), Layout())[0][0].step == 1


def flip(folder: Path) -> None:
    """Change one bit of the largest file."""
    victim = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def test_the_last_good_checkpoint_is_used_and_the_damage_named(
    data: Path,
    whole: Path,
    tmp_path: Path,
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    flip(out / "checkpoints" / "step_00000006")
    victim = next((out / "checkpoints" / "step_00000004").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-10])
    ((code, text),) = shared(1).run(spoken, [words(data, out)])[0]
    assert code == 0
    assert "passing over a checkpoint: " in text and "does not have the checksum it was saved with" in text
    assert (
        "bytes instead of" in text and f"going on after step 2, from {out}/checkpoints/step_00000002" in text
    )
    same_run(whole, out)
    for step in (4, 6):  # the damaged ones are whole again
        folder = out / "checkpoints" / f"step_0000000{step}"
        manifest.check_content(folder, manifest.read_manifest(folder))
    for folder in (out / "checkpoints").iterdir():
        flip(folder)
    ((code, text),) = shared(1).run(spoken, [words(data, out)])[0]
    assert code == 5 and "none of the checkpoints in" in text and "move them away" in text


@pytest.mark.parametrize("extra", ["", "--checkpoint.asynchronous"])
def test_a_full_disk_ends_the_run_and_names_the_last_good_one(
    data: Path,
    tmp_path: Path,
    extra: str,
):
    out = tmp_path / "run"
    assert shared(1).run(pretrain, [words(data, out, "--train.steps 2")]) == [[0]]
    ((code, text),) = shared(1).run(spoken, [words(data, out, extra)], True)[0]
    assert code == 5
    assert "step_00000004 failed on rank 0" in text and "File too large" in text and "GB are free in" in text
    assert f"the last whole one is {out}/checkpoints/step_00000002" in text
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000002"]


def spoken_on_a_small_disk(argv: list[str]) -> list[tuple[int, str]]:
    with mock.patch.object(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6)):
        return spoken([argv])


def test_a_disk_too_small_for_a_checkpoint_is_said_before_the_first_step(
    data: Path, whole: Path, tmp_path: Path
):
    out = tmp_path / "run"
    ((code, text),) = shared(1).run(spoken_on_a_small_disk, words(data, out))[0]
    assert code == 5 and f"starting in {out} failed on rank 0: a checkpoint needs 0.0" in text, text
    assert f"but 0.001 GB are free in {out}; make room" in text and not read(out / "metrics.jsonl")
    ((code, _),) = shared(1).run(spoken_on_a_small_disk, words(data, whole))[0]
    assert code == 0, "a run that is complete saves nothing"


def space_looked_for(out: Path) -> str:
    """`checkpoints` leads to a disk with room; then what a save left there can't be deleted."""
    _, optimizers = build(Layout(data=2))
    saver, usage = saving.Saver(out / "checkpoints", config(), optimizers), shutil._ntuple_diskusage
    free = {out: 0, (out / "checkpoints").resolve(): 10**9}
    with mock.patch.object(shutil, "disk_usage", lambda path: usage(0, 0, free[Path(path).resolve()])):
        saver.check_space()
    if dist.get_rank() == 0:
        (saver.root / ".step_00000002.partial").mkdir()
    busy = mock.Mock(side_effect=OSError(16, "Device or resource busy"))
    with mock.patch.object(shutil, "rmtree", busy), pytest.raises(CheckpointError) as caught:
        saver.check_space()
    return str(caught.value)


def test_space_is_looked_for_where_checkpoints_go_and_by_all_ranks_together(tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "disk").mkdir()
    (out / "checkpoints").symlink_to(tmp_path / "disk")
    for message in shared(2).run(space_looked_for, out, timeout=60):
        assert f"starting in {out} failed on rank 0" in message and "busy" in message


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["tensor", "bytes", "metadata", "common.pt"])
def test_no_pickle_of_a_stranger_runs(tmp_path: Path, where: str):
    """Every file that is unpickled, replaced by one that runs a command; the manifest agrees with it."""
    path, mark = tmp_path / "step_00000001", tmp_path / "executed"
    shared(1).run(save_once, str(tmp_path))
    evil = io.BytesIO()
    torch.save(Evil(mark), evil)
    content = evil.getvalue()
    torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists(), "the attack must work where nobody looks"
    mark.unlink()
    if where == "metadata":
        forge(path, manifest.METADATA, pickle.dumps(Evil(mark)))
    elif where == "common.pt":
        forge(path, "common.pt", content)
    else:
        metadata = pickle.loads((path / manifest.METADATA).read_bytes())
        for index, place in metadata.storage_data.items():
            kind = metadata.state_dict_metadata[index.fqn]
            if isinstance(kind, TensorStorageMetadata) == (where == "tensor"):
                place.relative_path, place.offset, place.length = "__0_0.distcp", 0, len(content)
        forge(path, "__0_0.distcp", content + bytes(100))
        forge(path, manifest.METADATA, pickle.dumps(metadata))
    error = shared(1).run(loading_fails, str(path))[0]
    assert error != "loaded" and str(path) in error
    assert not mark.exists(), f"a command ran: {error}"


def save_once(folder: str) -> None:
    _, optimizers = build(Layout())
    checkpoint.save(folder, 1, 8, config(), optimizers)
