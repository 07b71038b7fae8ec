"""The update in one pass, interpreted on CPUs, against megatron-core's optimizer in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from launch import shared
from small import build, drawn_step, snapshot

from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.training import checkpoint
from nextvid_mcore.training.ahead import Report
from nextvid_mcore.training.one_pass import OnePass
from nextvid_mcore.training.optimizer import RoleOptimizers

BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 500}
STEPS = 3


def pair(layout: Layout, **ddp) -> list[tuple]:
    """(model, optimizers) with megatron-core's update, and the same with ours."""
    found = [build(layout, dtype=torch.bfloat16, **ddp) for _ in range(2)]
    assert all(optimizers.one_pass is None for _, optimizers in found)  # these are CPUs
    found[1][1].one_pass = found[1][1].in_one_pass()
    return found


def broken_step(optimizers: RoleOptimizers, bad: str) -> tuple[bool, float]:
    """A step on whose last rank alone the loss or a gradient is not finite."""
    optimizers.zero_grad()
    loss = None
    if dist.get_rank() == dist.get_world_size() - 1:
        if bad == "loss":
            loss = torch.tensor(math.inf)
        else:
            next(iter(optimizers.modules.values())).encoder.block.layers[
                0
            ].mlp.linear_fc1.weight.main_grad.fill_(float(bad))
    for role in optimizers.roles.values():
        role.finish_grad_sync()
    outcome = optimizers.step(loss)
    return outcome.applied, outcome.grad_norm


def both_ways(layout: Layout, bad: str, ddp: dict) -> list[dict]:
    found = []
    for model, optimizers in pair(layout, **ddp):
        sent = []
        optimizers.send_reference = lambda sent=sent, o=optimizers: sent.append(o.updates)
        norms = [drawn_step(optimizers, 0).grad_norm]
        before = snapshot(optimizers)
        weights = [p.detach().clone() for p in model.parameters()]
        applied, norm = broken_step(optimizers, bad)
        same = all(torch.equal(a[-1], b[-1]) for a, b in zip(before, snapshot(optimizers), strict=True))
        same &= all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        norms += [drawn_step(optimizers, step).grad_norm for step in range(1, STEPS)]
        found.append(
            {
                "norms": norms,
                "skipped": (applied, math.isfinite(norm), same),
                "updates": (optimizers.updates, sent),
                "state": [(key, place, x) for key, _, place, x in snapshot(optimizers)],
                "weights": [p.detach().clone() for p in model.parameters()],
            }
        )
    return found


@pytest.mark.parametrize(
    ("layout", "bad", "ddp"),
    [
        (Layout(data=2), "nan", BUCKETS),
        (Layout(tensor=2), "inf", {}),
        (Layout(pipeline=2), "loss", {}),
    ],
    ids=["dp2-buckets-nan", "tp2-inf", "pp2-loss"],
)
def test_steps_are_megatron_cores(layout: Layout, bad: str, ddp: dict) -> None:
    for theirs, ours in shared(2).run(both_ways, layout, bad, ddp):
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        assert ours["skipped"] == theirs["skipped"] == (False, False, True)
        assert ours["updates"] == theirs["updates"] == (STEPS, [1, 2, 3])
        assert len(ours["state"]) == len(theirs["state"])
        for (key, place, a), (*other, b) in zip(ours["state"], theirs["state"], strict=True):
            assert [key, place] == other and a.dtype == b.dtype
            rtol = 2**-7 if a.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")
        for a, b in zip(ours["weights"], theirs["weights"], strict=True):  # the reference's too
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-7)


def order_of_a_step() -> list[str]:
    (_, _), (_, optimizers) = pair(Layout())
    done, update, read = [], OnePass.update, Report.read

    def noted(name: str, inner: Callable) -> Callable:
        return lambda *args: (done.append(name), inner(*args))[1]

    with (
        mock.patch.object(OnePass, "update", noted("update", update)),
        mock.patch.object(Report, "read", noted("read", read)),
    ):
        for role in optimizers.roles.values():
            role.finish_grad_sync()
        assert optimizers.step(None, lambda: done.append("then")).applied
    return done


def test_what_comes_then_is_given_out_before_the_host_waits() -> None:
    assert shared(1).run(order_of_a_step)[0] == ["update", "then", "read"]


def covered(layout: Layout, ddp: dict) -> dict[str, list[tuple[int, int, int]]]:
    """(first, end, size) of every parameter's part in this rank's tables, and where its tensors lie."""
    _, (model, optimizers) = pair(layout, **ddp)
    found = {}
    for (role, optimizer), table in zip(
        optimizers.optimizers.items(), optimizers.one_pass.tables, strict=True
    ):
        names = {p: n for n, p in optimizers.modules[role].named_parameters()}
        assert len(table.shards) == len(optimizer.local_parameters())
        for param, shard in zip(optimizer.local_parameters(), table.shards, strict=True):
            first = (shard.weight.data_ptr() - param.data_ptr()) // 2
            assert shard.grad.data_ptr() == param.main_grad.data_ptr() + 4 * first
            assert torch.equal(shard.master.bfloat16(), shard.weight)
            name = names[param]
            if name.startswith("encoder.") and role == "student":
                reference = dict(model.reference.named_parameters())[name.removeprefix("encoder.")]
                assert shard.reference.data_ptr() == reference.data_ptr() + 2 * first
            assert (shard.ema is not None) == (role == "student")
            found[f"{role}.{name}"] = (first, first + shard.weight.numel(), param.numel())
    everything = [f"{role}.{n}" for role, m in optimizers.modules.items() for n, _ in m.named_parameters()]
    return {name: found.get(name) for name in everything}


def test_shards_of_all_ranks_cover_every_parameter_once() -> None:
    ranks = shared(2).run(covered, Layout(data=2), BUCKETS)
    cut = 0
    for name in ranks[0]:
        parts = sorted(x for rank in ranks if (x := rank[name]) is not None)
        assert [first for first, *_ in parts] == [0, *(end for _, end, _ in parts[:-1])], name
        assert parts[-1][1] == parts[-1][2], name
        cut += len(parts) > 1
    assert cut > 1, "some must be cut"


def loaded_and_gone_on(layout: Layout, folder: str) -> list[tuple]:
    """A step after loading a checkpoint of one step, and after its weights alone; of both ways."""
    found = []
    for number, (model, optimizers) in enumerate(pair(layout)):
        settings = model.run
        drawn_step(optimizers, 0)
        path = checkpoint.save(f"{folder}/{number}", 1, 8, settings, optimizers)
        drawn_step(optimizers, 7)
        for weights_only in (False, True):
            checkpoint.load(path, settings, optimizers, weights_only)
            drawn_step(optimizers, 3)
            found.append((optimizers.updates, [x for *_, x in snapshot(optimizers)]))
    return found


def test_checkpoints_and_forgotten_moments(tmp_path) -> None:
    (theirs, fresh, *ours), *_ = shared(1).run(loaded_and_gone_on, Layout(), str(tmp_path))
    for (count, a), (wanted, b) in zip(ours, (theirs, fresh), strict=True):
        assert count == wanted
        for x, y in zip(a, b, strict=True):
            rtol = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-7)
    assert (theirs[0], fresh[0]) == (2, 1)
