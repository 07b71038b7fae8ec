"""The te backend against the local one, same weights, one GPU.

Tolerances: in fp32 both round differently inside GEMMs and norms (1e-4 of each tensor's largest
gradient); in bf16 a gradient's error is a few rounding steps of 2^-8, so directions are compared.
"""

from __future__ import annotations

import dataclasses

import parity
import pytest
import torch
from launch import run


def one_step(backend: str, precision: str) -> dict:
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.placement import resolve_placement
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.training.step import TrainStep

    config = parity.small()
    # Transformer Engine's kernels want multiples of 16
    generator = dataclasses.replace(config.model.predictor, width=64, heads=4, mlp=128)
    encoder = dataclasses.replace(config.model.encoder, width=64, heads=4, mlp=128)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, backend=backend, encoder=encoder, predictor=generator, decoder=generator
        ),
        train=dataclasses.replace(config.train, precision=precision),
    )
    init_distributed()
    seats = build_seats(resolve_placement(config, 1))
    seed_trackers(0, seats.home)
    step = TrainStep(config, seats)
    point = parity.schedule(config).at(0)
    clips = parity.clips(config, point, 0, 1)
    step.gradients(point, clips)
    names = {p: n for n, p in step.model.named_parameters()}
    grads = {names[p]: p.main_grad.float().cpu().clone() for p in names if p.requires_grad}
    results = [step.run(parity.schedule(config).at(i), parity.clips(config, point, 0, 1)) for i in range(2)]
    return {"grads": grads, "losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_te_equals_local(precision: str) -> None:
    local, te = (run(one_step, 1, backend, precision)[0] for backend in ("local", "te"))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert te["losses"] == pytest.approx(local["losses"], rel=tolerance)
    assert te["norms"] == pytest.approx(local["norms"], rel=tolerance)
    assert te["grads"].keys() == local["grads"].keys()
    for name, grad in local["grads"].items():
        other = te["grads"][name]
        assert grad.abs().max() > 0, name
        if precision == "fp32":
            assert (grad - other).abs().max() <= 1e-3 * grad.abs().max(), name
        else:
            cosine = torch.nn.functional.cosine_similarity(grad.flatten(), other.flatten(), dim=0)
            assert cosine > 0.99, f"{name}: {cosine}"
