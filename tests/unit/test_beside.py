"""The reference beside the others: what is refused, what it costs, and what libraries share."""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace

import parity
import pytest
import torch
from megatron.core import parallel_state

from nextvid_mcore.config import ConfigError, RoleParallel
from nextvid_mcore.models import fp8
from nextvid_mcore.parallel import memory, plan
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.training import beside, graphs

OWN = {"reference_stream": "own"}


@pytest.mark.parametrize(
    ("world", "changes", "words"),
    [
        (2, {"parallel": {"placement": "two-groups"}}, "here micro-batches overlap .*two-groups"),
        (2, {"parallel": {"encoder": RoleParallel(pipeline=2)}}, "here .*pipeline 2"),
        (1, {"mask": {"mode": "packed"}}, "here mask mode packed"),
        (1, {"parallel": {"recompute": "full"}}, "here recompute full"),
        (1, {"model": {"align": False}}, "without alignment no reference is run"),
        (1, {"train": OWN | {"cuda_graphs": "off"}}, "cuda_graphs is off"),
        (
            2,
            {
                "parallel": {"encoder": RoleParallel(tensor=2)},
                "model": {"backend": "te"},
                "train": OWN | {"precision": "bf16"},
                "fp8": {"all": "current"},
            },
            "auto does not record FP8 over tensor ranks; use --train.cuda-graphs on",
        ),
    ],
)
def test_refused_before_anything_starts(world: int, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=f"train reference_stream own.*{words}.*reference-stream shared"):
        plan.check(parity.small().altered(**{"train": OWN, **changes}), world, dry_run=True)


def test_no_gpu_is_said() -> None:
    config = parity.small().altered(train=OWN)
    placement = plan.check(config, 1, dry_run=True)
    for refused in (lambda: plan.check(config, 1), lambda: graphs.wanted(config, placement)):
        with pytest.raises(ConfigError, match="train reference_stream own.* there is no CUDA device"):
            refused()


def test_its_memory_is_counted() -> None:
    from nextvid_mcore import recipes

    config = recipes.get("vit_g").altered(train={"micro_batch": 16})
    found = []
    for choice in ("shared", "own"):
        each = config.altered(train={"reference_stream": choice})
        found.append(memory.rank_memory(each, resolve_placement(each, 1), 0, each.stages[0]))
    tokens, widths = 16 * 8 * 256, 2 * (1408 + 6144)
    assert found[1].activations - found[0].activations == tokens * widths * 2  # 0.92 GiB
    assert found[1].weights == found[0].weights
    assert "stream of its own" in plan.describe(each, 1) and "stream of its own" not in plan.describe(
        config, 1
    )


def test_scratch_memory_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what Transformer Engine keeps for its products, allocated once."""
    products = ModuleType("gemm")
    products.get_cublas_workspace = functools.cache(lambda device, ub, grouped: object())
    monkeypatch.setitem(sys.modules, beside._TE_PRODUCTS, products)
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", "shared")
    function, seen = products.get_cublas_workspace, []

    def look() -> tuple:
        return parallel_state._GLOBAL_MEMORY_BUFFER, products.get_cublas_workspace(0, False, False)

    reference = SimpleNamespace(config=SimpleNamespace(tensor_model_parallel_size=1, fp8=None))
    runner = beside.Beside(reference, torch.device("cpu"))
    with ExitStack() as until:
        for _ in range(2):
            runner.start(lambda: seen.append(look()), until)
            seen.append(look())
    (buffer, workspace), main, (again, workspace2), main2 = seen
    assert main == main2 == ("shared", function(0, False, False))
    assert buffer != "shared" and again != "shared"
    assert workspace is workspace2 is not main[1]
    with pytest.raises(ZeroDivisionError), ExitStack() as until:
        runner.start(lambda: 1 / 0, until)
    assert products.get_cublas_workspace is function and parallel_state._GLOBAL_MEMORY_BUFFER == "shared"


def test_scales_are_held_back_until_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's list of what it renews, as in its quantization.py."""
    renewed: list[list[str]] = []

    class Manager:
        quantization_state = SimpleNamespace(
            global_amax_buffer={f"{way} {who}": [1] for way in (True, False) for who in ("student", "mine")}
        )

        @staticmethod
        def get_key_in_buffer(forward: bool, recipe: object, group: str) -> str:
            return f"{forward} {group}"

        @classmethod
        def reduce_and_update_fp8_tensors(cls, forward: bool) -> None:
            renewed.append(sorted(cls.quantization_state.global_amax_buffer))

    package = "transformer_engine"
    for name in (package, f"{package}.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType(f"{package}.pytorch.quantization")
    module.FP8GlobalStateManager = Manager
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fp8, "_delayed_recipe", lambda form: None)
    settings = {"tensor_model_parallel_size": 1, "fp8": "hybrid", "fp8_recipe": "delayed"}
    reference = SimpleNamespace(config=SimpleNamespace(**settings, amax_group="mine"))
    runner, every = (
        beside.Beside(reference, torch.device("cpu")),
        sorted(Manager.quantization_state.global_amax_buffer),
    )
    with ExitStack() as until:
        wait = runner.start(lambda: torch.ones(1), until)
        Manager.reduce_and_update_fp8_tensors(True)  # where the student's pass ends
        assert wait() == 1
    assert renewed == [["False student", "True student"], every]
    with pytest.raises(ZeroDivisionError), ExitStack() as until:  # a pass that breaks off leaves no gap
        runner.start(lambda: torch.ones(1), until)
        raise ZeroDivisionError
    assert sorted(Manager.quantization_state.global_amax_buffer) == every


def test_products_leave_room_while_both_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("NVTE_EXT_MARGIN_SM", raising=False)
    monkeypatch.setattr(beside, "tuning", beside.Tuning(margin=16))
    margin = functools.partial(os.environ.get, "NVTE_EXT_MARGIN_SM")
    for tensor, wanted in ((1, None), (2, "16")):
        reference = SimpleNamespace(config=SimpleNamespace(tensor_model_parallel_size=tensor, fp8=None))
        with ExitStack() as until:
            wait = beside.Beside(reference, torch.device("cpu")).start(margin, until)
            assert margin() == wanted  # the student's pass
            assert wait() == wanted  # the reference's had it
            assert margin() is None
