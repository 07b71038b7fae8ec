"""A run doesn't start with a kernel that writes wrong FP8."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from nextvid_mcore import recipes, switches
from nextvid_mcore.config import ConfigError
from nextvid_mcore.config.fp8 import ROLES
from nextvid_mcore.models import fp8_check, fp8_mlp
from nextvid_mcore.models.specs import transformer_config
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.split import make_split

CPU = torch.device("cpu")
KERNELS = {"gelu": "GELU's kernel", "gelu_backward": "GELU's derivative", "norm": "the norm's kernel",
           "norm_both": "both directions", "turn_backward": "rotation's derivative"}  # fmt: skip


@pytest.fixture(autouse=True)
def own_mlp() -> None:
    fp8_mlp.use(True)


def check(tensor: int = 1, recompute: str = "none", roles: tuple[str, ...] = ROLES, **fp8: str) -> None:
    """What a rank with `roles` does before it starts."""
    config = recipes.get("tiny").altered(
        model={"backend": "te"}, train={"precision": "bf16"}, fp8=fp8, parallel={"recompute": recompute}
    )
    local = dataclasses.replace(config.model, backend="local")  # what a CPU has
    splits = {role: make_split(config, Layout(tensor), role) for role in roles}
    networks = {r: transformer_config(config.model.shape(r), local, splits[r]) for r in roles}
    fp8_check.check(config, networks, CPU)


def broken(monkeypatch, kernel: str, way: dict | None = None) -> None:
    """Half of the bytes wrong in the last direction that it writes, as a compiler once made them; every other
    call is the reference's. `way`: only where it is called so, by position."""
    from nextvid_mcore.models import triton_fp8
    from nextvid_mcore.models.triton_fp8 import Scaled

    right, calls = getattr(triton_fp8, kernel), itertools.count()

    def wrong(*args: object) -> object:
        found = right(*args)
        (low,) = (x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Scaled))
        asked = all(args[at] == value for at, value in (way or {}).items())
        if next(calls) % 2 == 0 and asked:
            (low.rows if low.columns is None else low.columns).view(torch.uint8)[::2] = 0x60
        return found

    monkeypatch.setattr(triton_fp8, kernel, wrong)


def test_kernels_that_are_right() -> None:
    check(all="delayed")
    check(all="delayed", format="e4m3", recompute="pieces")


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_kernels_are_checked_before_a_run(monkeypatch, kernel: str) -> None:
    broken(monkeypatch, kernel)
    with pytest.raises(ConfigError, match=rf"{KERNELS[kernel]}.* values wrong on .* use --no-fp8\.fused"):
        check(all="delayed")
    check(student="current")
    if kernel in ("norm_both", "turn_backward"):  # nobody calls them
        check(reference="delayed")
        check(all="delayed", roles=("predictor", "decoder"))
        with switches.changed(trained=False):
            check(all="delayed")
    check(all="delayed", tensor=2)
    check(all="delayed", recompute="full")
    fp8_mlp.use(False)
    check(all="delayed")
    fp8_mlp.use(True)


def test_gelu_is_checked_in_the_directions_that_a_run_asks_for(monkeypatch) -> None:
    from nextvid_mcore.models import triton_fp8

    columns, rows, right = 5, 6, triton_fp8.gelu
    both, alone = "GELU's kernel .* in both directions", "GELU's kernel .* for its gradient"
    broken(monkeypatch, "gelu", {columns: True, rows: True})
    with pytest.raises(ConfigError, match=both):
        check(all="delayed", recompute="core_attn")
    check(all="delayed", recompute="pieces")
    check(reference="delayed")
    monkeypatch.setattr(triton_fp8, "gelu", right)
    broken(monkeypatch, "gelu", {columns: True, rows: False})
    with pytest.raises(ConfigError, match=alone):
        check(all="delayed", recompute="pieces")
    check(all="delayed")
