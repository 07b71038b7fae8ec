"""The reference beside the student against both in line, recorded, on one GPU (two: test_nccl_layouts.py).

The same kernels read the same numbers, so losses agree to the last digits, and with them the scales of
`delayed`; gradients have sums by atomics, which keep no order. A stream that didn't wait, or scratch memory
that both write, would show here; that the streams do run at once is seen on the device.
"""

from __future__ import annotations

from typing import Any

import parity
import pytest
import test_fp8
import torch
from launch import shared


def overlap(work: Any) -> float:
    """Share of the kernels' time in which another one ran, from a recording of the device's activity."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recording:
        work()
        torch.cuda.synchronize()
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in recording.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0, 0
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / sum(stop - start for start, stop in spans)


def passes(recipe: str, stream: str) -> dict[str, Any]:
    """Losses, gradients and scales of replays, before and after an update."""
    config = test_fp8.small(all=recipe).altered(
        model={"compile": True}, train={"cuda_graphs": "on", "reference_stream": stream}
    )
    step, point = test_fp8.built(config)
    data, found = test_fp8.clips(config, point, step), []
    for repeats in (6, 3):
        for _ in range(repeats):  # the first are eager
            losses, _ = step.gradients(point, data)
            found.append((losses, parity.gradients(step)))
        step.run(point, data)
    metas = [getattr(module, "fp8_meta", {}) for module in step.model.modules()]
    scales = [meta["scaling_fwd"].scale.cpu() for meta in metas if "scaling_fwd" in meta]
    beside = step.engine.graphs.beside
    return {
        "passes": found,
        "scales": scales,
        "streams": beside is not None and beside.stream != torch.cuda.current_stream(),
        "overlap": overlap(lambda: step.gradients(point, data)),
    }


@pytest.mark.parametrize("recipe", ["none", "current", "delayed"])
def test_beside_equals_in_line(recipe: str) -> None:
    line, beside = (shared(1).run(passes, recipe, stream, timeout=90)[0] for stream in ("shared", "own"))
    print(f"\n{recipe}: at once {line['overlap']:.1%} in line, {beside['overlap']:.1%} beside", end="")
    assert beside["streams"] and not line["streams"]
    assert beside["overlap"] > max(0.03, 3 * line["overlap"])
    for number, ((losses, grads), (losses2, grads2)) in enumerate(
        zip(line["passes"], beside["passes"], strict=True)
    ):
        updated = number >= 6  # Adam's first updates make much of the last digits
        off = max(test_fp8.error(grads2[name], grad) for name, grad in grads.items())
        print(
            f"\n  {number}: loss {sum(losses2.values()) - sum(losses.values()):.1e}, gradients {off:.1e}",
            end="",
        )
        assert losses2 == pytest.approx(losses, rel=2e-2 if updated else 1e-6)
        assert off < (0.2 if updated else 1e-2)
    if recipe == "delayed":
        assert len(line["scales"]) == len(beside["scales"]) > 0
        for one, other in zip(line["scales"], beside["scales"], strict=True):
            torch.testing.assert_close(other, one, rtol=0.1, atol=0)  # over an update
