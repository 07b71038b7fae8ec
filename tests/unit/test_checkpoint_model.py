"""Which checkpoints a model may go on from: newer fields have their default, other differences are named."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nextvid_mcore import recipes
from nextvid_mcore.config import RunConfig
from nextvid_mcore.training import checkpoint
from nextvid_mcore.training.checkpoint import CheckpointError, check_model


def saved(monkeypatch: pytest.MonkeyPatch, config: RunConfig, *without: str) -> None:
    """A checkpoint of `config`, written before the model had the fields `without`."""
    state = json.loads(config.to_json())
    for name in without:
        *path, last = name.split(".")
        part = state["model"]
        for key in path:
            part = part[key]
        del part[last]
    monkeypatch.setattr(checkpoint, "read_state", lambda path: {"config": state})


def test_a_field_that_the_checkpoint_lacks_had_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.get("vit_l")
    saved(monkeypatch, config, "init_std", "align_target", "decoder")
    check_model("old", config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, align_target="none"))
    with pytest.raises(CheckpointError, match="model.align_target is layernorm there and none here"):
        check_model("old", other)
    check_model("old", other, weights_only=True)  # no tensor's shape depends on it


def test_a_field_without_a_default_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.get("vit_l")
    saved(monkeypatch, config, "encoder.depth")
    with pytest.raises(CheckpointError, match="model.encoder.depth is None there and 24 here"):
        check_model("old", config)


def test_another_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    saved(monkeypatch, recipes.get("vit_l"))
    with pytest.raises(CheckpointError, match="model.encoder.width is 1024 there and 1408 here"):
        check_model("old", recipes.get("vit_g"))


def test_weights_of_a_network_that_a_run_never_had_can_not_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    full = recipes.get("vit_l")
    for part, row in (("generate", "table2_align_ciso"), ("align", "table4_mask")):
        saved(monkeypatch, recipes.get(row))
        with pytest.raises(CheckpointError, match=f"model.{part} is False there and True here; set"):
            check_model("old", full, weights_only=True)
        saved(monkeypatch, full)
        check_model("old", recipes.get(row), weights_only=True)  # left behind
