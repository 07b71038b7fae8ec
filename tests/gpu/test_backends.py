"""The te backend against the local one, same weights, one GPU.

Tolerances: in fp32 both round differently inside GEMMs and norms (1e-4 of each tensor's largest
gradient); in bf16 a gradient's error is a few rounding steps of 2^-8, so directions are compared.
"""

from __future__ import annotations

import parity
import pytest
import torch
from launch import run

from nextvid_mcore.config import TransformerShape

# Transformer Engine's kernels want multiples of 16
SHAPES = (
    TransformerShape(width=64, depth=4, heads=4, mlp=128),
    TransformerShape(width=64, depth=2, heads=4, mlp=128),
)


def one_step(backend: str, precision: str) -> dict:
    config = parity.small(SHAPES).altered(model={"backend": backend}, train={"precision": precision})
    step = parity.built(config)
    point = parity.schedule(config).at(0)
    clips = parity.clips(config, point, 0, 1)
    step.gradients(point, clips)
    grads = parity.gradients(step)
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
