"""From the training model to the hub: same numbers for every network and mask mode, and no half export."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tool import tool

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, RunConfig, TransformerShape
from nextvid_mcore.hub import FILES, HubError, export
from nextvid_mcore.models.init import init_weights

CHANNELS = 10
convert_to_torch = tool("convert_to_torch")


def small(mode: str) -> RunConfig:
    """Different numbers wherever two could be confused: widths, heads, depths."""
    config = recipes.get("tiny")
    model = dataclasses.replace(
        config.model,
        encoder=TransformerShape(width=72, depth=3, heads=3, mlp=80),
        predictor=TransformerShape(width=48, depth=2, heads=4, mlp=56),
        decoder=TransformerShape(width=48, depth=2, heads=2, mlp=64),
    )
    return dataclasses.replace(config, model=model, mask=dataclasses.replace(config.mask, mode=mode))


def trained(config: RunConfig):
    """A training model with every tensor away from zero and one."""
    model = convert_to_torch.build_model(config, CHANNELS, convert_to_torch.one_process())
    for role, module in model.roles().items():
        init_weights(module, role, model.places["student"].groups, seed=3, std=0.1, noise=0.1)
    return model


def write(model, folder: Path) -> None:
    config = export.flat_config(model.run, CHANNELS, step=3, weights="online")
    export.write_folder(folder, config, convert_to_torch.hub_states(model, True))


def clips(config: RunConfig) -> torch.Tensor:
    return convert_to_torch.compared_clips(config, None)[0]


@pytest.mark.parametrize("mode", ["fixed", "packed", "truncate"])
def test_every_network_computes_the_same(tmp_path: Path, mode: str) -> None:
    config = small(mode)
    model = trained(config)
    write(model, tmp_path)
    rows = convert_to_torch.compare(model, tmp_path, clips(config), True)
    stretches = 4 if mode == "packed" else 2
    assert len(rows) == 1 + 4 * stretches
    for row in rows:
        assert row.scale > 0.1 and row.largest < 1e-5, row


def test_a_wrong_weight_is_seen_in_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("fixed")
    model = trained(config)
    monkeypatch.setattr(export, "ungroup_heads", lambda x, heads, parts: x)  # as megatron-core has it
    write(model, tmp_path)
    rows = convert_to_torch.compare(model, tmp_path, clips(config), True)
    assert rows and all(row.largest > 1e-3 and not row.good(1e-4) for row in rows)


def test_weights_that_were_not_loaded_are_refused() -> None:
    model = convert_to_torch.build_model(small("fixed"), CHANNELS, convert_to_torch.one_process())
    init_weights(model.student, "student", model.places["student"].groups, seed=0, std=0.1)
    convert_to_torch.hub_states(model, False)
    with pytest.raises(convert_to_torch.Mismatch, match="predictor: .* missing in the checkpoint"):
        convert_to_torch.hub_states(model, True)


def test_unknown_parameters_are_refused() -> None:
    for name in (
        "block.layers.0.self_attention.q_layernorm.weight",
        "pos_embed",
        "block.layers.0.input.bias",
    ):
        with pytest.raises(HubError, match=name):
            export.to_hub([(name, torch.zeros(4))], heads=2)


def test_heads_are_regrouped() -> None:
    a, parts, d = 3, 2, 4
    rows = torch.arange(a * parts * d).reshape(a, parts, d)
    regrouped = export.ungroup_heads(rows.flatten(), a, parts).reshape(parts, a, d)
    assert all(torch.equal(regrouped[p, h], rows[h, p]) for p in range(parts) for h in range(a))


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "export"
    with pytest.raises(RuntimeError), convert_to_torch.finished_or_nothing(out) as folder:
        (folder / "model.safetensors").write_text("x")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    with convert_to_torch.finished_or_nothing(out) as folder:
        (folder / "config.json").write_text("new")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_a_link_stays_and_where_one_stands_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to("large disk")
    with convert_to_torch.finished_or_nothing(tmp_path / "link") as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large disk" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large disk", "link"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="--out . is replaced as a whole, and you stand in it"):
        convert_to_torch.check_out(Path("."), False)


def test_a_checkpoint_may_be_named_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    for place, path in (("checkpoints", "step_00000002"), ("checkpoints/step_00000002", ".")):
        monkeypatch.chdir(tmp_path / place)
        assert convert_to_torch.last_rows(Path(path), 2, "ema") == [{"step": 2, "loss": 0.5}, None]


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_told(tmp_path: Path) -> None:
    for there, said in ((True, "torn"), (False, "was deleted while it was read: the run goes on")):
        (tmp_path / "step_00000002").mkdir(exist_ok=True)
        with (
            pytest.raises((OSError, ConfigError), match=said),
            convert_to_torch.still_there(tmp_path / "step_00000002"),
        ):
            if not there:
                (tmp_path / "step_00000002").rmdir()
            raise OSError("torn")


def test_a_folder_is_replaced_only_when_asked_and_only_an_export(tmp_path: Path) -> None:
    check = convert_to_torch.check_out
    check(tmp_path / "new", False)
    check(tmp_path, False)  # empty
    (tmp_path / "config.json").write_text("old")
    (tmp_path / FILES["decoder"]).write_text("old")
    with pytest.raises(ConfigError, match="--force"):
        check(tmp_path, False)
    check(tmp_path, True)
    with convert_to_torch.finished_or_nothing(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "new"
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds thesis.tex, which is no part of an export"):
        check(tmp_path, True)
    with pytest.raises(ConfigError, match="is a file"):
        check(tmp_path / "thesis.tex", True)


def test_clips_come_from_the_manifest_or_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from nextvid_mcore.data.manifest import Item, SetWriter

    (tmp_path / "broken.mp4").write_bytes(b"no video")
    ramp = torch.arange(80, dtype=torch.uint8).repeat(50, 1)[..., None].repeat(1, 1, 3)
    Image.fromarray(ramp.numpy()).save(tmp_path / "ramp.png")
    with SetWriter(tmp_path / "manifest", "mixed") as writer:
        writer.add([Item(str(tmp_path / "ramp.png"), "image"), Item(str(tmp_path / "broken.mp4"), "video")])
    config = small("fixed")
    data = dataclasses.replace(config.data, manifest=str(tmp_path / "manifest"))
    for run, path in ((dataclasses.replace(config, data=data), None), (config, str(tmp_path))):
        video, source = convert_to_torch.compared_clips(run, path)
        assert video.shape == (1, 3, 8, 64, 64) and "real clips" in source
        assert torch.equal(video[:, :, 0], video[:, :, 7]) and (video.diff(dim=-1) > 0).float().mean() > 0.7
        assert video.min() == pytest.approx(15 / 127.5 - 1, abs=0.02)  # the middle of the picture
        assert "skipped: " in capsys.readouterr().out
    (tmp_path / "ramp.png").unlink()
    with pytest.raises(ConfigError, match="no clip that can be decoded"):
        convert_to_torch.compared_clips(config, str(tmp_path))


def test_the_runs_configuration_survives_json() -> None:
    for name in recipes.names():
        config = recipes.get(name)
        assert export.run_config(json.loads(config.to_json())) == config
    plain = json.loads(recipes.get("vit_l").to_json())
    assert (
        export.run_config({k: v for k, v in plain.items() if k != "eval"}).eval == recipes.get("vit_l").eval
    )
    plain["model"]["encoder"]["experts"] = 8
    with pytest.raises(HubError, match="model: .*encoder has 'experts', which this version"):
        export.run_config(plain)
    del plain["model"]["encoder"]["experts"], plain["stages"][0]["batch"]
    with pytest.raises(HubError, match="'batch'"):
        export.run_config(plain)


def test_a_run_in_fp8_is_converted_as_any_other():
    from nextvid_mcore import cli

    line = "tiny --dry-run --model.backend te --train.precision bf16 --train.micro-batch 8 --fp8.all current"
    config, _ = cli.parse(line.split())
    groups = convert_to_torch.one_process()
    assert convert_to_torch.build_model(config, 12, groups).config.fp8 is None
