"""The layout table on NCCL: every case that this host's GPUs can seat.

fp32 to the same tolerances as on a CPU (TF32 is off). In bf16 every layout rounds its partial sums
elsewhere, by up to 2^-8 of a value: losses within 1% and gradients within 2% of the whole gradient's
norm are what three steps of bf16 allow; a wrong layout is off by its missing share, 50% and more.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import test_layouts as cpu
import torch
from launch import run

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
FITS = [name for name, case in cpu.LAYOUTS.items() if case.ranks <= max(GPUS, 1)]
LOW = ("tp2-sp", "dp2", "pp2", "two-1-1", "two-1-1-reference", "tp2-generator-dp2")


def every(cases: dict[str, cpu.Case]) -> dict[str, dict]:
    return {name: cpu.rank(case) for name, case in cases.items()}


@functools.cache
def runs(ranks: int) -> list[dict[str, dict]]:
    cases = {name: cpu.LAYOUTS[name] for name in FITS if cpu.LAYOUTS[name].ranks == ranks}
    return run(every, ranks, cases, timeout=400)


@pytest.mark.parametrize("name", [name for name in FITS if name != cpu.LAYOUTS[name].reference])
def test_fp32_equals_one_gpu(name: str) -> None:
    case = cpu.LAYOUTS[name]
    one, results = runs(1)[0][case.reference], [each[name] for each in runs(case.ranks)]
    cpu.is_what_it_says(case, one, results)
    cpu.trains_the_same(one, results)


def low(name: str, backend: str) -> cpu.Case:
    return dataclasses.replace(cpu.LAYOUTS[name], precision="bf16", backend=backend)


@functools.cache
def low_runs(ranks: int, backend: str) -> list[dict[str, dict]]:
    names = ["one-rank"] if ranks == 1 else [n for n in LOW if cpu.LAYOUTS[n].ranks == ranks]
    return run(every, ranks, {name: low(name, backend) for name in names}, timeout=400)


@pytest.mark.parametrize("backend", ["local", "te"])
@pytest.mark.parametrize("name", LOW)
def test_bf16_is_near_one_gpu(name: str, backend: str) -> None:
    ranks = cpu.LAYOUTS[name].ranks
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, {GPUS} are here")
    one, results = low_runs(1, backend)[0]["one-rank"], [each[name] for each in low_runs(ranks, backend)]
    for mine, theirs in zip(one["results"], results[0]["results"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-2)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=2e-2)
    want, got = cpu.merged([one], "grads"), cpu.merged(results, "grads")
    norm = sum(g.square().sum() for g in want.values()).sqrt()
    assert sum((want[k] - got[k]).square().sum() for k in want).sqrt() <= 2e-2 * norm


EDGES = [("fp32", "local"), ("bf16", "te")]


@functools.cache
def edge_runs() -> list[dict[str, dict]]:
    """Both kinds of edge in one start of two processes."""
    cases = {
        f"{name} {edge} {precision}": dataclasses.replace(
            cpu.LAYOUTS[name], edge=edge, precision=precision, backend=backend, compile=False
        )
        for precision, backend in EDGES
        for name in ("two-1-1", "two-1-1-reference")
        for edge in ("bridge", "direct")
    }
    return run(every, 2, cases, timeout=120)


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
