"""Checkpoints: any layout to any other, nothing lost by a crash, nothing foreign loaded."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import run, shared
from small import assemble, build, config, drawn_step, largest_difference, snapshot
from torch.distributed.checkpoint.metadata import MetadataIndex

from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.training import checkpoint, manifest, saving
from nextvid_mcore.training.manifest import CheckpointError

EXTRA = {"bad_files": ["a.mp4"], "bad": 1}


def save_steps(folder: str, layout: Layout, steps: int, keep: int = 0, every: bool = False, **ddp):
    """Train with drawn gradients and save, at the end or after every step; return the whole state."""
    _, optimizers = build(layout, **ddp)
    for step in range(1, steps + 1):
        drawn_step(optimizers, step - 1)
        if every or step == steps:
            path = checkpoint.save(folder, step, 8 * step, config(), optimizers, EXTRA, keep)
    return str(path), snapshot(optimizers)


def load_and_go_on(path: str, layout: Layout, weights_only: bool = False):
    """Load into a model with other weights; return its state, then its state one step later."""
    settings = dataclasses.replace(config(), train=dataclasses.replace(config().train, seed=9))
    model, optimizers = build(layout, settings)
    drawn_step(optimizers, 77)
    progress = checkpoint.load(path, config(), optimizers, weights_only)
    reference = {n: p.detach().cpu().clone() for n, p in model.reference.named_parameters()}
    loaded = snapshot(optimizers)
    drawn_step(optimizers, progress.step)
    return progress, loaded, snapshot(optimizers), reference, optimizers.updates


@pytest.fixture(scope="module")
def tp2(tmp_path_factory) -> tuple[Path, dict, dict]:
    """A checkpoint after 2 steps at TP 2, its whole state, and the state one step later."""
    folder = tmp_path_factory.mktemp("tp2")
    ranks = shared(2).run(save_steps, str(folder), Layout(tensor=2), 2)
    later = shared(2).run(save_steps, str(folder / "later"), Layout(tensor=2), 3)
    return Path(ranks[0][0]), assemble([r[1] for r in ranks]), assemble([r[1] for r in later])


@pytest.mark.parametrize(
    "layout", [Layout(data=2), Layout(), Layout(pipeline=2)], ids=["dp2", "one-rank", "pp2"]
)
def test_saved_at_tp2_goes_on_elsewhere(tp2, layout):
    path, state, later = tp2
    ranks = shared(layout.size).run(load_and_go_on, str(path), layout)
    progress, _, _, reference, updates = ranks[0]
    assert (progress.step, progress.samples, progress.extra, updates) == (2, 16, EXTRA, 3)
    loaded = assemble([r[1] for r in ranks])
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) for k in state), "weights, moments or EMA changed"
    assert any("optimizer.state.ema" in key for key, _ in state)
    assert largest_difference(assemble([r[2] for r in ranks]), later) < 1e-5
    name = "block.layers.0.mlp.linear_fc1.weight"
    ema = state["optimizer.state.ema.student.encoder.block.layers.mlp.linear_fc1.weight", 0]
    assert torch.equal(reference[name], ema)


def test_many_buckets_with_padded_ends(tmp_path):
    """DP 2 with small buckets, whose ends are padded and cut parameters in two, to one rank."""
    save = functools.partial(save_steps, overlap_grad_reduce=True, bucket_size=500)
    ranks = shared(2).run(save, str(tmp_path), Layout(data=2), 1)
    loaded = shared(1).run(load_and_go_on, ranks[0][0], Layout())[0]
    state, loaded = assemble([r[1] for r in ranks]), assemble([loaded[1]])
    assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_weights_only_starts_a_new_run(tp2):
    path, state, _ = tp2
    progress, loaded, _, _, updates = shared(1).run(load_and_go_on, str(path), Layout(), True)[0]
    assert (progress.step, progress.samples, updates) == (0, 0, 1)
    for (key, layer), tensor in assemble([loaded]).items():
        moments = "exp_avg" in key
        assert torch.equal(tensor, torch.zeros_like(tensor) if moments else state[key, layer]), key


def weights(path: str, which: str, prefixes: tuple[str, ...]):
    model, optimizers = build(Layout())
    modules = {p: model.get_submodule(p) for p in prefixes}
    state = checkpoint.load_weights(path, modules, optimizers.groups, which)
    return state["step"], {n: p.detach().cpu().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("which", ["online", "ema"])
def test_load_weights_alone_on_one_rank(tp2, which):
    path, state, _ = tp2
    step, loaded = shared(1).run(weights, str(path), which, ("student.encoder", "decoder"))[0]
    prefix = "optimizer.state.ema." if which == "ema" else ""
    assert step == 2
    key = "student.encoder.block.layers.mlp.linear_fc1.weight"
    assert torch.equal(loaded["student.encoder.block.layers.1.mlp.linear_fc1.weight"], state[prefix + key, 1])
    assert torch.equal(loaded["decoder.output.weight"], state["decoder.output.weight", None])
    assert not torch.equal(state[key, 1], state["optimizer.state.ema." + key, 1])


def test_keep_and_latest(tmp_path, caplog):
    ranks = shared(1).run(save_steps, str(tmp_path), Layout(), 4, 2, True)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000003", "step_00000004"] and ranks[0][0].endswith(names[1])
    (tmp_path / "step_00000004" / manifest.MANIFEST).unlink()
    (tmp_path / "step_00000005").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000003"
    assert "step_00000005 has no manifest.json" in caplog.text and "step_00000004" in caplog.text
    shared(1).run(save_steps, str(tmp_path), Layout(), 4)  # a damaged one of the same step is replaced
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000004"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def die_while_saving(folder: str, moment: str) -> None:
    _, optimizers = build(Layout(data=2))
    drawn_step(optimizers, 0)
    checkpoint.save(folder, 1, 8, config(), optimizers, EXTRA, keep=1)
    drawn_step(optimizers, 1)

    def killed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 0:
        owner, name = {
            "tensors": (saving.filesystem_async.FileSystemWriterAsync, "finish"),
            "manifest": (manifest, "write_json"),
            "rename": (Path, "rename"),
        }[moment]
        setattr(owner, name, killed)
    checkpoint.save(folder, 2, 16, config(), optimizers, EXTRA, keep=1)


@pytest.mark.parametrize("moment", ["tensors", "rename"])
def test_killed_while_saving_leaves_the_last_good_one(tmp_path, moment):
    assert run(die_while_saving, 2, str(tmp_path), moment, check=False)[0] is None
    assert (tmp_path / ".step_00000002.partial").exists()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    ranks = shared(1).run(load_and_go_on, str(tmp_path / "step_00000001"), Layout())
    assert ranks[0][0].step == 1
    shared(1).run(save_steps, str(tmp_path), Layout(), 2)  # and the remains don't disturb the next one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def save_on_a_full_disk(folder: str, how: str) -> list[str]:
    _, optimizers = build(Layout(data=2))
    checkpoint.save(folder, 1, 8, config(), optimizers, keep=1)
    drawn_step(optimizers, 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    usage, messages = shutil.disk_usage, []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if how == "writing" and dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    if how == "beforehand":
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
    try:
        checkpoint.save(folder, 2, 16, config(), optimizers, keep=1)
    except CheckpointError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        shutil.disk_usage = usage
    checkpoint.save(folder, 3, 24, config(), optimizers)  # the run goes on and can save again
    return messages


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("writing", "saving .*step_00000002 failed.*OSError.*GB are free"),
        ("beforehand", "needs .*are free in"),
    ],
)
def test_a_full_disk_keeps_the_last_good_one(tmp_path, how, message):
    for messages in shared(2).run(save_on_a_full_disk, str(tmp_path), how):
        assert len(messages) == 1
        assert re.search(message, messages[0]), messages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    assert checkpoint.latest(tmp_path).name == "step_00000003"


def loading_fails(path: str, settings=None, weights_only: bool = False) -> str:
    _, optimizers = build(Layout())
    try:
        checkpoint.load(path, settings or config(), optimizers, weights_only)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def forge(path: Path, name: str, content: bytes) -> None:
    """Replace a file and bring the manifest into line, as an attacker would."""
    (path / name).write_bytes(content)
    files = json.loads((path / manifest.MANIFEST).read_text())
    files[name] = manifest.fingerprint(path / name)
    (path / manifest.MANIFEST).write_text(json.dumps(files))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/nextvid_checkpoint_was_executed",)


def damage(path: Path, kind: str) -> None:
    shard = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = shard.read_bytes()
    if kind == "truncated":
        shard.write_bytes(data[:-100])
    elif kind == "flipped":
        middle = len(data) // 2
        shard.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif kind == "missing":
        shard.unlink()
    elif kind == "state":
        forge(path, checkpoint.STATE, b'{"step": "many"}')
    elif kind == "metadata":
        forge(path, manifest.METADATA, pickle.dumps(Evil()))
    elif kind == "entry":  # a pickle where megatron-core reads its common state without weights_only
        metadata = pickle.loads((path / manifest.METADATA).read_bytes())
        entry = next(k for k in metadata.state_dict_metadata if k.startswith("common_state"))
        place = metadata.storage_data[MetadataIndex(entry)]
        evil = io.BytesIO()
        torch.save(Evil(), evil)
        victim = path / place.relative_path
        place.offset, place.length = victim.stat().st_size, len(evil.getvalue())
        forge(path, victim.name, victim.read_bytes() + evil.getvalue())
        forge(path, manifest.METADATA, pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "bytes instead of"),
        ("flipped", "does not have the checksum it was saved with"),
        ("missing", "is missing"),
        ("state", "state.json can't be read"),
        ("metadata", "asks for posix.system"),
        ("entry", "is not plain data"),
    ],
)
def test_damaged_and_hostile_checkpoints_are_refused(tp2, tmp_path, kind, message):
    copy = tmp_path / "step_00000002"
    shutil.copytree(tp2[0], copy)
    damage(copy, kind)
    error = shared(1).run(loading_fails, str(copy))[0]
    assert message in error and error.startswith(("loading", "checking")) and str(copy) in error
    assert not Path("/tmp/nextvid_checkpoint_was_executed").exists()


def test_another_model_is_named_by_its_fields(tp2):
    model = config().model
    wide = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, width=48), rope_base=5.0)
    error = shared(1).run(loading_fails, str(tp2[0]), dataclasses.replace(config(), model=wide))[0]
    assert "model.encoder.width is 24 there and 48 here" in error
    assert "model.rope_base is 10000.0 there and 5.0 here" in error
    bent = dataclasses.replace(config(), model=dataclasses.replace(model, align_target="none"))
    assert "align_target" in shared(1).run(loading_fails, str(tp2[0]), bent)[0]
    assert shared(1).run(loading_fails, str(tp2[0]), bent, True)[0] == "loaded"
