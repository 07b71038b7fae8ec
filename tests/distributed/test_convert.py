"""tools/convert_to_torch.py on checkpoints of several layouts, as a user runs it.

The expected features don't come from the converter's own comparison: the ranks that saved the checkpoint
computed them, split as they were.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import run
from safetensors.torch import load_file
from tool import TOOLS, tool

from nextvid_mcore import recipes
from nextvid_mcore.config import RoleParallel, RunConfig, TransformerShape
from nextvid_mcore.hub import FILES, load_config, load_decoder, load_encoder, load_predictor
from nextvid_mcore.schedule import Schedule

STEPS = 2


def small(tensor: int, pipeline: int, precision: str) -> RunConfig:
    config = recipes.get("tiny")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            encoder=TransformerShape(width=48, depth=4, heads=4, mlp=96),
            predictor=TransformerShape(width=32, depth=2, heads=4, mlp=64),
            decoder=TransformerShape(width=32, depth=2, heads=2, mlp=64),
        ),
        optim=dataclasses.replace(config.optim, ema=0.5),  # far from the trained weights in two steps
        train=dataclasses.replace(config.train, init_noise=0.05, precision=precision),
        parallel=dataclasses.replace(
            config.parallel, encoder=RoleParallel(tensor, pipeline), sequence=tensor > 1
        ),
    )


def video() -> torch.Tensor:
    return torch.rand(2, 3, 8, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1


def save_run(folder: str, tensor: int, pipeline: int, precision: str) -> dict[str, torch.Tensor]:
    """Two updates by made-up gradients, then a checkpoint. Features [B, t*n, D] where no stage is split."""
    from nextvid_mcore.models.nextvid import NextVid
    from nextvid_mcore.models.places import together
    from nextvid_mcore.models.sequences import full_sequence, patchify
    from nextvid_mcore.parallel.groups import build_groups, init_distributed, resolve_layout, seed_trackers
    from nextvid_mcore.parallel.split import make_split
    from nextvid_mcore.targets import target_channels
    from nextvid_mcore.training import checkpoint
    from nextvid_mcore.training.optimizer import RoleOptimizers, finalize_grads, wrap_roles

    init_distributed()
    config = small(tensor, pipeline, precision)
    layout = resolve_layout(config, dist.get_world_size())
    groups = build_groups(layout)
    seed_trackers(0, groups)
    model = NextVid(
        config, together(make_split(config, layout, "student"), groups.collection), target_channels(config)
    )
    model.reset_parameters()
    roles = wrap_roles(model, groups)
    optimizers = RoleOptimizers(roles, config.optim, groups, model.reference)
    optimizers.set_lr(dataclasses.replace(Schedule(config).at(0), lr=0.05, lr_flow=0.05))
    for step in range(STEPS):
        optimizers.zero_grad()
        for role in roles.values():
            for parameter in role.module.parameters():  # a function of the weight: the same in every layout
                parameter.main_grad.copy_(torch.cos(40 * parameter.detach().float() + step))
                if getattr(parameter, "sequence_parallel", False):
                    parameter.main_grad.div_(tensor)  # is summed over the tensor ranks
        finalize_grads(roles, groups)
        assert optimizers.step().applied
    checkpoint.save(f"{folder}/checkpoints", STEPS, 16, config, optimizers)

    if pipeline > 1:
        return {}
    patches = patchify(video(), config.model).transpose(0, 1).contiguous()
    sequence = full_sequence(config.model, 4, patches.shape[1], torch.device("cpu"))
    features = {}
    with torch.no_grad():
        for name, encoder in (("online", model.student.encoder), ("ema", model.reference)):
            out = encoder.eval()(patches, sequence).float()
            if layout.sequence:
                parts = [torch.empty_like(out) for _ in range(tensor)]
                dist.all_gather(parts, out.contiguous(), group=groups.collection.tp)
                out = torch.cat(parts)
            features[name] = out.transpose(0, 1)
    return features


def convert(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tool's exit status, here in this process."""
    monkeypatch.delenv("RANK", raising=False)
    return tool("convert_to_torch").main([str(argument) for argument in arguments])


def convert_as_a_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "convert_to_torch.py"), *map(str, arguments)]
    environment = os.environ | {"RANK": "3", "WORLD_SIZE": "8"}  # left over from some launcher
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of TP 2 with sequence parallelism, fp32, and what its own ranks computed."""
    folder = tmp_path_factory.mktemp("tp2")
    return folder, run(save_run, 2, str(folder), 2, 1, "fp32", timeout=200)[0]


def test_a_tensor_parallel_run(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, features = saved
    result = convert_as_a_user(folder, "--out", tmp_path / "ema", "--all")
    assert result.returncode == 0, result.stderr
    assert "SYNTHETIC" in result.stdout and "names no manifest" in result.stdout
    assert not result.stderr, "a good conversion says nothing there"
    assert convert(folder, "--out", tmp_path / "online", "--weights", "online", monkeypatch=monkeypatch) == 0
    for weights in ("online", "ema"):
        with torch.no_grad():
            mine = load_encoder(tmp_path / weights)(video())
        torch.testing.assert_close(mine, features[weights], rtol=0, atol=1e-4)
        config = load_config(tmp_path / weights)
        assert (config["weights"], config["step"], config["recipe"]) == (weights, STEPS, "tiny")
    assert (features["online"] - features["ema"]).abs().max() > 0.1
    load_predictor(tmp_path / "ema"), load_decoder(tmp_path / "ema")
    assert not (tmp_path / "online" / "predictor.safetensors").exists()


def test_another_layout_gives_the_same_export(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "pp2"
    run(save_run, 2, str(other), 1, 2, "fp32", timeout=200)
    for source, out in ((saved[0], "a"), (other / "checkpoints" / "step_00000002", "b")):
        assert convert(source, "--out", tmp_path / out, "--all", monkeypatch=monkeypatch) == 0
    for name in FILES.values():
        a, b = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_bf16_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "bf16", tmp_path / "out"
    features = run(save_run, 1, str(source), 1, 1, "bf16", timeout=200)[0]
    assert convert(source, "--out", out, "--tolerance", "-1", monkeypatch=monkeypatch) == 1
    assert "above the tolerance -1; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]

    assert convert(source, "--out", out, monkeypatch=monkeypatch) == 0
    with torch.no_grad():
        mine = load_encoder(out)(video())
    scale = features["ema"].abs().max()
    assert (mine - features["ema"]).abs().max() < 0.1 * scale  # training computes in bf16
    assert (mine - features["online"]).abs().max() > 0.2 * scale

    capsys.readouterr()
    for arguments, message in (
        ((source, "--out", out), "is not empty"),
        ((source, "--out", out / "config.json" / "x"), "config.json cannot be written (File exists); name"),
        ((tmp_path / "none", "--out", tmp_path / "b"), "no such folder"),
        ((out, "--out", tmp_path / "b"), "holds no whole checkpoint"),
        ((source, "--out", tmp_path / "b", "--clips", "nowhere.mp4"), "--clips nowhere.mp4: no such file"),
    ):
        assert convert(*arguments, monkeypatch=monkeypatch) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "out"]
