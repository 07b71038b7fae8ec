"""The fast paths against the slow ones, one GPU: compiled pieces with FlexAttention, and CUDA graphs.

Compiled and eager round at other places (bf16: a gradient's error is some rounding steps of 2^-8), so
directions and norms are compared: cosine above 0.99 per tensor, losses and norms within 2%. A recorded pass
runs the same kernels as an eager one: losses and gradients within 1e-3, since sums by atomics keep no order.
"""

from __future__ import annotations

import dataclasses

import parity
import pytest
import torch
import torch.nn.functional as F
from launch import run

WAYS = {  # backend, compiled, recorded
    "local": ("local", False, "off"),
    "local compiled": ("local", True, "off"),
    "te": ("te", False, "off"),
    "te compiled": ("te", True, "off"),
    "te recorded": ("te", False, "on"),
    "te compiled recorded": ("te", True, "on"),
}


def steps(backend: str, compile: bool, graphs: str) -> dict:
    """Losses and norms of five steps, and two later gradients of the same weights and clips."""
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.placement import resolve_placement
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    config = parity.small()
    shape = dataclasses.replace(config.model.encoder, width=128, heads=4, mlp=256)  # heads of 32
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            backend=backend,
            compile=compile,
            encoder=shape,
            predictor=shape,
            decoder=shape,
            image_size=64,
        ),
        train=dataclasses.replace(config.train, precision="bf16", cuda_graphs=graphs),
    )
    init_distributed()
    seats = build_seats(resolve_placement(config, 1))
    seed_trackers(0, seats.home)
    step = TrainStep(config, seats)
    assert (step.engine.graphs is not None) == (graphs == "on")
    point = parity.schedule(config).at(0)
    clips = parity.clips(config, point, 0, 1)
    losses, norms, grads = [], [], []
    for _ in range(5):
        result = step.run(point, clips)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    for _ in range(2):  # with graphs these passes are replays
        step.gradients(point, clips)
        named = step.model.named_parameters()
        grads.append({n: p.main_grad.float().cpu().clone() for n, p in named if p.requires_grad})
    return {"losses": losses, "norms": norms, "grads": grads}


def all_ways() -> dict:
    return {name: steps(*way) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def found() -> dict:
    return run(all_ways, 1, timeout=400)[0]


@pytest.mark.parametrize("backend", ["local", "te"])
def test_compiled_equals_eager(found: dict, backend: str) -> None:
    eager, compiled = found[backend], found[f"{backend} compiled"]
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=2e-2)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=2e-2)
    for name, grad in eager["grads"][0].items():
        assert grad.abs().max() > 0, name
        cosine = F.cosine_similarity(grad.flatten(), compiled["grads"][0][name].flatten(), dim=0)
        assert cosine > 0.99, f"{name}: {cosine}"


@pytest.mark.parametrize("way", ["te", "te compiled"])
def test_recorded_equals_eager(found: dict, way: str) -> None:
    eager, recorded = found[way], found[f"{way} recorded"]
    assert recorded["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert recorded["norms"] == pytest.approx(eager["norms"], rel=1e-3)
    for name, grad in eager["grads"][0].items():
        for other in recorded["grads"]:  # a second replay must not remember the first
            assert (grad - other[name]).norm() <= 2e-2 * grad.norm(), name


def test_flex_equals_the_masked_reference() -> None:
    from nextvid_mcore.models import kernels
    from nextvid_mcore.models.attention import Frames, regular_pattern

    device = torch.device("cuda")
    visible, asked = (Frames(0, 7, 96), Frames(0, 7, 48)), (Frames(1, 7, 256),) * 2
    for queries, keys, rule in ((visible, visible, "causal"), (asked, visible, "autoregressive")):
        pattern = regular_pattern(queries, keys, rule, device)
        sizes = [sum(x.number * x.tokens for x in part) for part in (queries, keys, keys)]
        made = [torch.randn(2, 3, s, 64, device=device) for s in sizes]
        exact = [x.clone().requires_grad_() for x in made]
        half = [x.bfloat16().requires_grad_() for x in made]
        wanted, found = kernels.masked(*exact, pattern), kernels.flex(*half, pattern)
        assert kernels.choose(half[0], pattern) is kernels.flex
        grad = torch.randn_like(wanted)
        wanted.backward(grad)
        found.backward(grad.bfloat16())
        for a, b in ((wanted, found), *((x.grad, y.grad) for x, y in zip(exact, half, strict=True))):
            assert (a - b.float()).norm() <= 1e-2 * a.norm()
