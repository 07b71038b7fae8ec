"""A run doesn't start with a kernel that writes wrong FP8."""

from __future__ import annotations

import itertools

import pytest
import torch

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.models import fp8_check, fp8_layer, fp8_mlp

CPU = torch.device("cpu")
KERNELS = {"gelu": "GELU's kernel", "gelu_backward": "GELU's derivative", "norm": "the norm's kernel",
           "norm_both": "both directions", "turn_backward": "rotation's derivative"}  # fmt: skip


@pytest.fixture(autouse=True)
def switches(monkeypatch) -> None:
    monkeypatch.setattr(fp8_layer, "_SWITCHES", dict.fromkeys(fp8_layer.SWITCHES, True))
    fp8_mlp.use(True)


def config(**fp8: str):
    return recipes.get("tiny").altered(model={"backend": "te"}, train={"precision": "bf16"}, fp8=fp8)


def broken(monkeypatch, kernel: str) -> None:
    """Half of the bytes wrong in the last direction that it writes, as a compiler once made them; every other
    call is the reference's."""
    from nextvid_mcore.models import triton_fp8
    from nextvid_mcore.models.triton_fp8 import Scaled

    right, calls = getattr(triton_fp8, kernel), itertools.count()

    def wrong(*args: object) -> object:
        found = right(*args)
        (low,) = (x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Scaled))
        if next(calls) % 2 == 0:
            (low.rows if low.columns is None else low.columns).view(torch.uint8)[::2] = 0x60
        return found

    monkeypatch.setattr(triton_fp8, kernel, wrong)


def test_kernels_that_are_right() -> None:
    fp8_check.check(config(all="delayed"), CPU)
    fp8_check.check(config(all="delayed", format="e4m3"), CPU)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_kernels_are_checked_before_a_run(monkeypatch, kernel: str) -> None:
    broken(monkeypatch, kernel)
    with pytest.raises(ConfigError, match=rf"{KERNELS[kernel]}.* values wrong on .* use --no-fp8\.fused"):
        fp8_check.check(config(all="delayed"), CPU)
    fp8_check.check(config(student="current"), CPU)
    if kernel in ("norm_both", "turn_backward"):  # nobody calls them
        fp8_check.check(config(reference="delayed"), CPU)
        fp8_layer.use(trained=False)
        fp8_check.check(config(all="delayed"), CPU)
    fp8_mlp.use(False)
    fp8_check.check(config(all="delayed"), CPU)
    fp8_mlp.use(True)
