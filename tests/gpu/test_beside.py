"""The reference beside the student against both in line, recorded, on one GPU (two: test_nccl_layouts.py).

The same kernels read the same numbers, so losses agree to the last digits, and with them the scales of
`delayed`; gradients have sums by atomics, which keep no order. A stream that didn't wait, or scratch memory
that both write, would show here; that the streams do run at once is seen on the device.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import parity
import pytest
import test_fp8
import torch
from launch import shared

from nextvid_mcore.training import step as training_step


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


def broken_off(stream: str | None) -> tuple[list, list[str], bool]:
    """Losses and gradients of three passes; with a `stream`, recording breaks off in the student's forward
    pass, when nobody has waited for the reference."""
    warnings: list[str] = []
    settings = {"cuda_graphs": "auto", "reference_stream": stream} if stream else {"cuda_graphs": "off"}
    step, point = test_fp8.built(test_fp8.small().altered(train=settings))

    def break_off(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("broken off")

    step.model.student.encoder.block.layers[2].register_forward_hook(break_off)
    data = test_fp8.clips(step.config, point, step)
    with mock.patch.object(training_step.log, "warning", lambda text, *args: warnings.append(text % args)):
        found = [(step.gradients(point, data)[0], parity.gradients(step)) for _ in range(3)]
    torch.cuda.synchronize()
    return found, warnings, step.engine.graphs is None


def test_a_recording_that_breaks_off_with_both_under_way() -> None:
    eager, _, _ = shared(1).run(broken_off, None, timeout=60)[0]
    again, warnings, left = shared(1).run(broken_off, "own", timeout=60)[0]
    assert left and len(warnings) == 1 and "broken off" in warnings[0]
    for (losses, grads), (wanted, exact) in zip(again, eager, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-3)
        for name, grad in exact.items():
            assert test_fp8.error(grads[name], grad) < 2e-2, name
