"""Sharded AdamW, the global norm, skipping and the EMA: the same in every layout."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launch import shared
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from small import RATES, assemble, build, config, drawn_step, largest_difference, snapshot, train_step

from nextvid_mcore.config import ConfigError
from nextvid_mcore.models import fused
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.training.optimizer import wrap_roles
from nextvid_mcore.training.shards import ShardedAdamW

STEPS = 3


def real_steps(layout: Layout, **ddp) -> tuple:
    model, optimizers = build(layout, **ddp)
    start = snapshot(optimizers)
    norms = [train_step(model, optimizers, step).grad_norm for step in range(STEPS)]
    optimizers.gather_weights()
    shapes = {n: tuple(p.shape) for n, p in model.student.named_parameters()}
    return norms, snapshot(optimizers), start, shapes


@functools.cache
def real_on_one_rank() -> tuple:
    (norms, end, start, shapes), *_ = shared(1).run(real_steps, Layout())
    return norms, assemble([end]), assemble([start]), shapes


OVERLAP = {
    "settings": config().altered(model={"compile": False}),
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 500,
}


@pytest.mark.parametrize(
    ("layout", "ddp"),
    [
        (Layout(tensor=2), {}),
        (Layout(data=2), {}),
        (Layout(tensor=2, sequence=True), {}),
        (Layout(data=2), OVERLAP),
    ],
    ids=["tp2", "dp2", "sp2", "dp2-overlap"],
)
def test_layouts_take_the_same_steps(layout, ddp):
    one_norms, one, start, one_shapes = real_on_one_rank()
    ranks = shared(2).run(functools.partial(real_steps, **ddp), layout)
    whole = assemble([r[1] for r in ranks])
    for norms, *_ in ranks:
        assert norms == pytest.approx(one_norms, rel=1e-5)
    assert all(norm > config().optim.clip for norm in one_norms), "the clip must take part"
    for key, tensor in one.items():
        update = (tensor - start[key]).norm()
        assert (whole[key] - tensor).norm() <= 1e-4 * update + 1e-7, key
    fc1 = "encoder.block.layers.0.mlp.linear_fc1.weight"
    assert ranks[0][3][fc1][0] * layout.tensor == one_shapes[fc1][0]  # really split


def drawn_steps(layout: Layout, steps: int, settings=None, **ddp) -> tuple:
    model, optimizers = build(layout, settings, **ddp)
    start = snapshot(optimizers)
    norms = [drawn_step(optimizers, step).grad_norm for step in range(steps)]
    reference = {n: p.detach().cpu().clone() for n, p in model.reference.named_parameters()}
    buckets = [len(b.buckets) for r in optimizers.roles.values() for b in r.buffers]
    return norms, snapshot(optimizers), start, reference, buckets, sorted(optimizers.roles)


@functools.cache
def drawn_on_one_rank() -> tuple:
    return shared(1).run(drawn_steps, Layout(), STEPS)[0]


@pytest.mark.parametrize(
    ("layout", "ddp"),
    [
        (Layout(pipeline=2), {}),
        (Layout(data=4), {"overlap_grad_reduce": True, "bucket_size": 500}),
        (Layout(tensor=2, data=2), {}),
    ],
    ids=["pp2", "dp4-buckets", "tp2dp2"],
)
def test_norm_weights_and_ema_with_drawn_gradients(layout, ddp):
    norms, end, *_ = drawn_on_one_rank()
    ranks = shared(layout.size).run(functools.partial(drawn_steps, **ddp), layout, STEPS)
    assert largest_difference(assemble([r[1] for r in ranks]), assemble([end])) < 1e-5
    for rank_norms, *_ in ranks:
        assert rank_norms == pytest.approx(norms, rel=1e-5)
    if ddp:
        assert max(ranks[0][4]) > 3, "the buckets must be several"
    if layout.pipeline == 2:
        assert ranks[0][5] == ["student"] and ranks[1][5] == ["decoder", "predictor", "student"]


def test_one_step_is_adamw_with_table_8():
    """The first update by hand: clipped gradient, decay on matrices alone, the decoder's own rate."""
    _, _, start, *_ = drawn_on_one_rank()
    (norm,), end, *_ = shared(1).run(drawn_steps, Layout(), 1)[0]
    start, end = assemble([start]), assemble([end])
    optim = config().optim
    moments = [x for (key, _), x in end.items() if key.startswith("optimizer.state.exp_avg.")]
    clipped = torch.stack([x.norm() for x in moments]).norm() / (1 - optim.beta1)
    assert norm > 1.5 * optim.clip and clipped.item() == pytest.approx(optim.clip, rel=1e-4)
    for (key, layer), before in start.items():
        if key.startswith("optimizer."):
            continue
        moment = end[f"optimizer.state.exp_avg.{key}", layer]
        second = end[f"optimizer.state.exp_avg_sq.{key}", layer]
        grad = moment / (1 - optim.beta1)
        torch.testing.assert_close(second, (1 - optim.beta2) * grad**2)
        lr = RATES.lr_flow if key.startswith("decoder.") else RATES.lr
        decay = optim.weight_decay if before.dim() >= 2 else 0.0
        expected = before * (1 - lr * decay) - lr * grad / (grad.abs() + optim.eps)
        torch.testing.assert_close(end[key, layer], expected, msg=lambda m, k=key: f"{k}: {m}")
        torch.testing.assert_close(end[f"optimizer.state.param.{key}", layer], end[key, layer])
        if key.startswith("student."):
            average = end[f"optimizer.state.ema.{key}", layer]
            torch.testing.assert_close(average, optim.ema * before + (1 - optim.ema) * end[key, layer])
        else:
            assert (f"optimizer.state.ema.{key}", layer) not in end


def masters_copied(layout: Layout) -> list[list[torch.Tensor]]:
    """The weights before, after our copy of drawn bf16 masters, and after megatron-core's."""
    _, optimizers = build(layout, None, torch.bfloat16, overlap_grad_reduce=True, bucket_size=500)
    found = []
    for copy in (None, ShardedAdamW, DistributedOptimizer):
        for optimizer in optimizers.optimizers.values():
            if copy is not None:
                for i, param in enumerate(optimizer.local_parameters()):
                    generator = torch.Generator().manual_seed(i)
                    optimizer.main(param).data.normal_(generator=generator)
                    param.data.zero_()
                copy._copy_main_params_to_model_params(optimizer)
        found.append([p.clone() for m in optimizers.modules.values() for p in m.parameters()])
    return found


def test_master_weights_are_copied_as_megatron_core_does() -> None:
    for before, mine, wanted in shared(2).run(masters_copied, Layout(data=2)):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(before, mine, strict=True))
        assert {x.dtype for x in mine} == {torch.bfloat16}


def skipping(layout: Layout, bad: str) -> tuple:
    model, optimizers = build(layout)
    drawn_step(optimizers, 0)
    before = snapshot(optimizers)
    reference = [p.detach().clone() for p in model.reference.parameters()]
    optimizers.zero_grad()
    loss = None
    if dist.get_rank() == dist.get_world_size() - 1:  # one rank alone has the trouble
        if bad == "loss":
            loss = torch.tensor(math.inf)
        else:
            weight = optimizers.modules["student"].encoder.block.layers[0].mlp.linear_fc1.weight
            weight.main_grad.fill_(float(bad))
    if bad != "loss" and layout.data > 1:
        for role in optimizers.roles.values():
            role.finish_grad_sync()
    outcome = optimizers.step(loss)
    after = snapshot(optimizers)
    same = all(torch.equal(a[-1], b[-1]) for a, b in zip(before, after, strict=True))
    same &= all(torch.equal(a, b) for a, b in zip(reference, model.reference.parameters(), strict=True))
    again = drawn_step(optimizers, 1)
    return outcome.applied, outcome.grad_norm, same, optimizers.updates, again.applied, snapshot(optimizers)


@pytest.mark.parametrize(
    ("layout", "bad"),
    [(Layout(data=2), "nan"), (Layout(tensor=2), "inf"), (Layout(pipeline=2), "loss")],
    ids=["dp2-nan", "tp2-inf", "pp2-loss"],
)
def test_a_non_finite_step_changes_nothing_anywhere(layout, bad):
    ranks = shared(2).run(skipping, layout, bad)
    for applied, norm, same, updates, again, _ in ranks:
        assert not applied and not math.isfinite(norm) and same
        assert updates == 2 and again
    (_, clean, *_) = shared(1).run(drawn_steps, Layout(), 2)[0]
    assert largest_difference(assemble([r[-1] for r in ranks]), assemble([clean])) < 1e-5


def in_bf16(layout: Layout) -> dict:
    model, optimizers = build(layout, config(ema=0.99925), dtype=torch.bfloat16)
    start = dict(assemble([snapshot(optimizers)])) if layout.size == 1 else None
    rounded = {n: p.detach().cpu().clone() for n, p in model.student.encoder.named_parameters()}
    for step in range(20):
        drawn_step(optimizers, step)
        for name, p in model.student.encoder.named_parameters():  # what a bf16 EMA would do
            rounded[name].lerp_(p.detach().cpu(), 1 - 0.99925)
    return {
        "start": start,
        "state": snapshot(optimizers),
        "reference": {n: p.detach().cpu().clone() for n, p in model.reference.named_parameters()},
        "rounded": rounded,
    }


def test_ema_is_fp32_and_the_reference_is_its_rounding():
    one = shared(1).run(in_bf16, Layout())[0]
    state, start = assemble([one["state"]]), one["start"]
    stuck = []
    for name, weights in one["reference"].items():
        parts = name.split(".")  # block.layers.<layer>. ... : layers are stacked under one key
        layer = int(parts.pop(2)) if "layers" in parts else None
        key = "student.encoder." + ".".join(parts)
        ema, begin = state[f"optimizer.state.ema.{key}", layer], start[f"optimizer.state.ema.{key}", layer]
        assert ema.dtype == torch.float32 and weights.dtype == torch.bfloat16
        assert (ema != begin).float().mean() > 0.99
        assert torch.equal(weights, ema.bfloat16()), name
        stuck.append((one["rounded"][name] == begin.bfloat16()).float().mean().item())
    # In bf16 most entries of the average would not have moved at all in the same 20 steps.
    assert sum(stuck) / len(stuck) > 0.5


def test_the_all_gather_gives_every_rank_the_whole_reference():
    one = shared(1).run(in_bf16, Layout())[0]
    for rank in shared(2).run(in_bf16, Layout(data=2)):
        for name, weights in rank["reference"].items():
            torch.testing.assert_close(weights, one["reference"][name], rtol=1e-2, atol=1e-4)


def test_overlapped_gathers_and_compiled_norms_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(fused, "compiles", lambda x: True)  # as on CUDA
    model = SimpleNamespace(roles=lambda: {"student": torch.nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="overlap_param_gather .* use --model.compile False"):
        wrap_roles(model, {}, overlap_grad_reduce=True, overlap_param_gather=True)
