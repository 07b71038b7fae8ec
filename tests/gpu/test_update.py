"""The update in one pass on a GPU: against megatron-core's optimizer, and that the host waits for nothing."""

from __future__ import annotations

import math

import parity
import test_fast_paths
import torch
from launch import run, shared
from small import build, config, drawn_step, snapshot
from unit.test_triton_update import (  # noqa: F401  collected here again, on the GPU
    test_a_gradient_that_is_not_finite_changes_nothing,
    test_nothing_outside_a_shard_is_written,
    test_steps_are_adamw_and_lerp,
)

from nextvid_mcore import switches
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.training import ahead
from nextvid_mcore.training.microbatch import Outline
from nextvid_mcore.training.one_pass import OnePass
from nextvid_mcore.training.optimizer import RoleOptimizers

STEPS, BROKEN = 10, 5
CYCLES = 1_000_000_000  # of the device's clock: about half a second


def made(one_pass: bool, compile: bool = True) -> tuple:
    settings = config(ema=0.99).altered(model={"compile": compile})
    with switches.changed(one_pass=one_pass):
        return build(Layout(), settings, torch.bfloat16)


def broken(optimizers: RoleOptimizers) -> bool:
    """A step whose gradient is not finite: whether it says so and leaves all as it was."""
    before = snapshot(optimizers)
    optimizers.zero_grad()
    weight = optimizers.modules["student"].encoder.block.layers[0].mlp.linear_fc1.weight
    weight.main_grad[3, 5] = math.nan
    outcome = optimizers.step()
    same = all(torch.equal(a[-1], b[-1]) for a, b in zip(before, snapshot(optimizers), strict=True))
    return same and not outcome.applied and not math.isfinite(outcome.grad_norm)


def addresses(optimizers: RoleOptimizers) -> list[int]:
    return [
        p.data_ptr() for m in (*optimizers.modules.values(), optimizers.reference) for p in m.parameters()
    ]


def ten_steps(one_pass: bool) -> dict:
    model, optimizers = made(one_pass)
    where, norms, skipped = addresses(optimizers), [], []
    for step in range(STEPS):
        if step == BROKEN:
            skipped.append(broken(optimizers))
        norms.append(drawn_step(optimizers, step).grad_norm)
    rounded = all(
        torch.equal(weight, master.bfloat16())
        for each in optimizers.optimizers.values()
        for weight, master in zip(each.weights, each._masters, strict=True)
    )
    ema = optimizers.ema
    rounded &= all(torch.equal(place, ema._shards[p].bfloat16()) for p, place in ema.places.items())
    assert where == addresses(optimizers)
    return {
        "ours": optimizers.one_pass is not None,
        "note": optimizers.note(),
        "norms": norms,
        "skipped": skipped,
        "updates": optimizers.updates,
        "rounded": rounded,
        "state": [(key, x) for key, _, _, x in snapshot(optimizers)],
        "reference": [p.detach().cpu() for p in model.reference.parameters()],
    }


def test_ten_steps_are_megatron_cores() -> None:
    theirs, ours = (shared(1).run(ten_steps, one_pass)[0] for one_pass in (False, True))
    assert (theirs["ours"], ours["ours"]) == (False, True)
    assert "in one pass" in ours["note"] and "Adam" in theirs["note"]
    for found in (theirs, ours):
        assert found["skipped"] == [True] and found["rounded"] and found["updates"] == STEPS
    torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(theirs["norms"]), rtol=1e-5, atol=0)
    for (key, a), (_, b) in zip(ours["state"], theirs["state"], strict=True):
        if a.dtype == torch.bfloat16:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-7)
        else:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9, key
    for a, b in zip(ours["reference"], theirs["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-7)


def host_is_ahead() -> tuple[bool, bool, int]:
    """Whether the update was given out, and the device still busy before it, when the host read the norm."""
    _, optimizers = made(True)
    drawn_step(optimizers, 0)
    loss, given, seen = torch.ones((), device="cuda"), [], []
    for _ in range(2):  # a kernel's first launch waits: CUDA loads it then
        optimizers.step(loss)
    update, read = OnePass.update, ahead.Report.read

    def giving(self: OnePass, norm: torch.Tensor, number: int) -> None:
        update(self, norm, number)
        given.append(number)

    def reading(self: ahead.Report) -> list[float]:
        seen.append((bool(given), slept.query()))
        return read(self)

    OnePass.update, ahead.Report.read = giving, reading
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    slept = torch.cuda.current_stream().record_event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert optimizers.step(loss).applied
    finally:
        torch.cuda.set_sync_debug_mode("default")
        OnePass.update, ahead.Report.read = update, read
    ((first, done),) = seen
    return first, done, given[0]


def test_the_host_waits_for_nothing_before_the_update() -> None:
    assert shared(1).run(host_is_ahead)[0] == (True, False, 4)


def recorded_step() -> bool:
    config = test_fast_paths.small("te", True, "on")
    step = parity.built(config)
    point = parity.schedule(config).at(0)
    clips = parity.clips(config, point, 0, 1)
    coming = Outline.of(clips[0], point.stage.tau_samples)
    for _ in range(5):
        step.run(point, clips, coming)
    ours = step.optimizers.one_pass is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        return ours and step.run(point, clips, coming).applied
    finally:
        torch.cuda.set_sync_debug_mode("default")
        step.close()


def test_a_recorded_step_waits_for_its_numbers_alone() -> None:
    assert run(recorded_step, 1, timeout=300)[0]


def test_without_compiled_pieces_it_is_megatron_cores() -> None:
    assert shared(1).run(uncompiled)[0] == (None, None)


def uncompiled() -> tuple:
    fp32 = build(Layout(), config())[1].one_pass
    return fp32, made(True, compile=False)[1].one_pass
