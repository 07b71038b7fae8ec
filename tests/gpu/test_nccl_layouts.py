"""The layout table on NCCL: every case that this host's GPUs can seat.

fp32 to the same tolerances as on a CPU (TF32 is off). In bf16 every layout rounds its partial sums
elsewhere, by up to 2^-8 of a value: losses within 1% and gradients within 2% of the whole gradient's
norm are what three steps of bf16 allow; a wrong layout is off by its missing share, 50% and more.
What is compiled and what is recorded runs other kernels than eager bf16, and is held to the same.

All cases of a number of ranks run in the same processes, the direct edge first; with -s each says its time.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time

import pytest
import test_layouts as cpu
import torch
from launch import shared

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
FITS = [name for name, case in cpu.LAYOUTS.items() if case.ranks <= max(GPUS, 1)]
LOW = ("tp2-sp", "tp2-sp-overlap", "dp2", "pp2", "two-1-1", "two-1-1-reference", "tp2-generator-dp2")
PATIENCE = 400


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """Both worlds import at the same time."""
    if GPUS:
        for ranks in range(1, min(GPUS, 2) + 1):
            shared(ranks)


def every(cases: dict[str, cpu.Case]) -> dict[str, dict]:
    found = {}
    for name, case in cases.items():
        begin = time.perf_counter()
        found[name] = cpu.rank(case)
        if os.environ["RANK"] == "0":
            print(f"{case.ranks} ranks, {name}: {time.perf_counter() - begin:.1f} s", flush=True)
    return found


EDGES = [("fp32", "local"), ("bf16", "te")]


@functools.cache
def edge_runs() -> list[dict[str, dict]]:
    """Both kinds of edge in one start of two processes."""
    cases = {
        f"{name} {edge} {precision}": dataclasses.replace(
            cpu.LAYOUTS[name], edge=edge, precision=precision, backend=backend
        )
        for precision, backend in EDGES
        for name in ("two-1-1", "two-1-1-reference")
        for edge in ("bridge", "direct")
    }
    return shared(2).run(every, cases, timeout=PATIENCE)


@pytest.mark.parametrize("precision", [precision for precision, _ in EDGES])
@pytest.mark.parametrize("name", ["two-1-1", "two-1-1-reference"])
def test_the_direct_edge_equals_the_bridge(name: str, precision: str) -> None:
    """Quicker than a comparison with one GPU, which the bridge has passed."""
    if GPUS < 2:
        pytest.skip(f"needs 2 GPUs, {GPUS} are here")
    found = edge_runs()
    bridge, direct = ([each[f"{name} {edge} {precision}"] for each in found] for edge in ("bridge", "direct"))
    loss, grads = (1e-5, 1e-5) if precision == "fp32" else (1e-2, 2e-2)
    for a, b in zip(bridge[0]["results"], direct[0]["results"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=loss)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=grads)
        assert b["applied"]
        theirs, ours = a["crossed"]["edge_bytes_per_clip"], b["crossed"]["edge_bytes_per_clip"]
        assert theirs["forward"] == ours["forward"] >= ours["backward"] > 0
    want, got = cpu.merged(bridge, "grads"), cpu.merged(direct, "grads")
    assert want.keys() == got.keys()
    norm = sum(g.square().sum() for g in want.values()).sqrt()
    difference = sum((want[k] - got[k]).square().sum() for k in want).sqrt()
    print(f"{name} {precision}: gradients differ by {float(difference / norm):.1e} of their norm")
    assert norm > 0 and difference <= grads * norm


def low(name: str, backend: str, **changes: object) -> cpu.Case:
    return dataclasses.replace(cpu.LAYOUTS[name], precision="bf16", backend=backend, **changes)


def near(one: list[dict], results: list[dict]) -> None:
    """The same losses, norms and first gradients, to bf16."""
    for mine, theirs in zip(one[0]["results"], results[0]["results"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-2)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=2e-2)
    want, got = cpu.merged(one, "grads"), cpu.merged(results, "grads")
    norm = sum(g.square().sum() for g in want.values()).sqrt()
    difference = sum((want[k] - got[k]).square().sum() for k in want).sqrt()
    print(f"gradients differ by {float(difference / norm):.1e} of their norm")
    assert want.keys() == got.keys() and norm > 0 and difference <= 2e-2 * norm


RECORDED = {
    "dp2": {},
    "tp2": {},
    "tp2-sp": {"overlap": "auto"},  # in line where it is eager
    "tp2-sp-overlap": {},
    "tp2-generator-dp2": {"sequence": True},
}


@functools.cache
def recorded_runs() -> list[dict[str, dict]]:
    cases = {
        f"{name} {graphs}": low(name, "te", graphs=graphs, **changes)
        for name, changes in RECORDED.items()
        for graphs in ("off", "on")
    }
    return shared(2).run(every, cases, timeout=PATIENCE)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_equals_eager(name: str) -> None:
    """The collectives of tensor parallelism are recorded with the pass."""
    if GPUS < 2:
        pytest.skip(f"needs 2 GPUs, {GPUS} are here")
    found = recorded_runs()
    near([each[f"{name} off"] for each in found], [each[f"{name} on"] for each in found])


@functools.cache
def compiled_runs() -> list[dict[str, dict]]:
    names = ("tp2-sp", "tp2-sp-overlap")
    cases = {name: low(name, "te", graphs="on", compile=True) for name in names}
    return shared(2).run(every, cases, timeout=PATIENCE)


@pytest.mark.parametrize("name", ["tp2-sp", "tp2-sp-overlap"])
def test_compiled_and_recorded_equals_eager(name: str) -> None:
    """Also where rows travel beside the products: the plain layout is what it is compared with."""
    if GPUS < 2:
        pytest.skip(f"needs 2 GPUs, {GPUS} are here")
    near([each["tp2-sp off"] for each in recorded_runs()], [each[name] for each in compiled_runs()])


@functools.cache
def low_runs(ranks: int, backend: str) -> list[dict[str, dict]]:
    names = ["one-rank"] if ranks == 1 else [n for n in LOW if cpu.LAYOUTS[n].ranks == ranks]
    return shared(ranks).run(every, {name: low(name, backend) for name in names}, timeout=PATIENCE)


@pytest.mark.parametrize("backend", ["te", "local"])
@pytest.mark.parametrize("name", LOW)
def test_bf16_is_near_one_gpu(name: str, backend: str) -> None:
    ranks = cpu.LAYOUTS[name].ranks
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, {GPUS} are here")
    near([low_runs(1, backend)[0]["one-rank"]], [each[name] for each in low_runs(ranks, backend)])


@functools.cache
def runs(ranks: int) -> list[dict[str, dict]]:
    cases = {name: cpu.LAYOUTS[name] for name in FITS if cpu.LAYOUTS[name].ranks == ranks}
    return shared(ranks).run(every, cases, timeout=PATIENCE)


@pytest.mark.parametrize("name", [name for name in FITS if name != cpu.LAYOUTS[name].reference])
def test_fp32_equals_one_gpu(name: str) -> None:
    case = cpu.LAYOUTS[name]
    one, results = runs(1)[0][case.reference], [each[name] for each in runs(case.ranks)]
    cpu.is_what_it_says(case, one, results)
    cpu.trains_the_same(one, results)
