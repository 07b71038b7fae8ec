"""Every layout trains the same: losses, gradients, weights and EMA against one rank, in fp32.

A new layout is one line of LAYOUTS.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import parity
import pytest
import torch
import torch.distributed as dist
from launch import run

STEPS = 3  # the third is of another stage, with more frames and another flow learning rate


@dataclass(frozen=True)
class Case:
    """A layout and what else differs from the reference run."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    recompute: str = "none"


LAYOUTS = {
    "one-rank": Case(1),
    "tp2": Case(2, tensor=2),
    "tp2-sp": Case(2, tensor=2, sequence=True),
    "dp2": Case(2),
    "pp2": Case(2, pipeline=2),
    "pp2-recompute": Case(2, pipeline=2, recompute="full"),
    "tp2-pp2-sp": Case(4, tensor=2, pipeline=2, sequence=True),
    "tp2-dp2-sp": Case(4, tensor=2, sequence=True),
    "pp2-dp2": Case(4, pipeline=2),
    "recompute-full": Case(1, recompute="full"),
    "recompute-core-attn": Case(1, recompute="core_attn"),
}


def every(names: list[str]) -> dict[str, dict]:
    """All cases of one number of ranks in one start of the processes."""
    return {name: rank(LAYOUTS[name]) for name in names}


def rank(case: Case) -> dict:
    """Three steps; what this rank saw and holds."""
    from nextvid_mcore.config import RoleParallel
    from nextvid_mcore.parallel.groups import build_groups, init_distributed, resolve_layout, seed_trackers
    from nextvid_mcore.training.step import TrainStep

    config = parity.small(
        encoder=RoleParallel(tensor=case.tensor, pipeline=case.pipeline),
        sequence=case.sequence,
        recompute=case.recompute,
    )
    init_distributed()
    layout = resolve_layout(config, dist.get_world_size())
    groups = build_groups(layout)
    seed_trackers(0, groups)
    step = TrainStep(config, groups)
    metadata = {"dp_cp_group": groups.collection.dp_cp}

    def state(pick) -> list[tuple]:
        out = []
        for name, module in step.model.roles().items():
            out += parity.shards(module.sharded_state_dict(prefix=f"{name}.", metadata=metadata), pick)
        return out

    schedule = parity.schedule(config)
    out: dict = {"start": state(lambda p: p), "results": [], "shapes": {}}
    for number in range(STEPS):
        point = schedule.at(number)
        mine = parity.clips(config, point, groups.data_rank, layout.data)
        out["micro_batches"] = len(mine)
        if number == 0:
            with torch.profiler.profile() as profile:
                step.gradients(point, mine)
            out["traffic"] = collectives(profile)
            # under the distributed optimizer a rank's buffer holds the reduced gradient of its own share
            out["grads"] = reduced(step, groups, metadata)
        out["results"].append(dataclasses.asdict(step.run(point, mine)))
    out["end"] = state(lambda p: p)
    reference = step.model.reference.sharded_state_dict(prefix="reference.", metadata=metadata)
    out["ema"] = parity.shards(reference, lambda p: p)
    out["shapes"] = {n: tuple(p.shape) for n, p in step.model.named_parameters()}
    return out


def reduced(step, groups, metadata) -> list[tuple]:
    """Whole reduced gradients of this rank's parameters, gathered from the data ranks' shares."""
    group = groups.collection.dp_cp
    for role in step.roles.values():
        for buffer in role.buffers:
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)
    out = []
    for name, module in step.model.roles().items():
        entries = module.sharded_state_dict(prefix=f"{name}.", metadata=metadata)
        out += parity.shards(entries, lambda p: p.main_grad)
    return out


def collectives(profile: torch.profiler.profile) -> set[str]:
    """The kinds of c10d operators that a profile saw."""
    return {e.name.removeprefix("c10d::").strip("_") for e in profile.events() if e.name.startswith("c10d::")}


@functools.cache
def runs(ranks: int) -> list[dict[str, dict]]:
    """Per rank, the results of every case of `ranks` ranks."""
    names = [name for name, case in LAYOUTS.items() if case.ranks == ranks]
    return run(every, ranks, names, timeout=600)


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return runs(1)[0]["one-rank"]


def merged(results: list[dict], name: str) -> dict[str, torch.Tensor]:
    return parity.assemble([r[name] for r in results])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one-rank"])
def test_layout_equals_one_rank(name: str, one_rank: dict) -> None:
    case = LAYOUTS[name]
    results = [each[name] for each in runs(case.ranks)]

    # the layout is what it says
    data = case.ranks // (case.tensor * case.pipeline)
    assert all(r["micro_batches"] == parity.BATCH // data >= 2 for r in results)
    whole = one_rank["shapes"]["student.encoder.block.layers.0.mlp.linear_fc1.weight"]
    for r in results:
        shape = r["shapes"]["student.encoder.block.layers.0.mlp.linear_fc1.weight"]
        assert shape == (whole[0] // case.tensor, whole[1])
    held = [{n.split(".")[0] for n in r["shapes"]} for r in results]
    with_generator = sum("decoder" in h for h in held)
    assert with_generator == case.ranks // case.pipeline
    layers = [sum(n.endswith("linear_fc2.weight") and "student" in n for n in r["shapes"]) for r in results]
    assert sum(layers) == 4 * case.tensor * data and (case.pipeline == 1 or max(layers) < 4)
    traffic = results[0]["traffic"]
    assert ("allreduce" in traffic) == (case.tensor > 1)
    assert {"allgather_base", "reduce_scatter_base"} <= traffic or not case.sequence
    assert ("reduce_scatter_base" in traffic) == case.sequence
    assert ({"send", "recv"} <= traffic) == (case.pipeline > 1)

    # and trains the same
    for reference, *others in zip(one_rank["results"], *(r["results"] for r in results), strict=True):
        for other in others:
            for key in ("loss", "loss_flow", "loss_align", "grad_norm"):
                assert other[key] == pytest.approx(reference[key], rel=1e-5), key
            for key, value in reference["monitors"].items():
                assert other["monitors"][key] == pytest.approx(value, rel=1e-4), key
            assert other["applied"]
    start = merged([one_rank], "start")
    for key, tensor in merged(results, "start").items():
        assert torch.equal(tensor, start[key]), f"{key} starts differently"
    want, got = merged([one_rank], "grads"), merged(results, "grads")
    assert want.keys() == got.keys()
    floor = 1e-5 * max(g.abs().max() for g in want.values())
    for key, grad in want.items():
        scale = grad.abs().max()
        assert scale > 0, f"{key} has no gradient: the comparison proves nothing"
        assert (grad - got[key]).abs().max() <= 1e-5 * max(scale, floor), key
    want, got = merged([one_rank], "end"), merged(results, "end")
    update = sum((want[k] - start[k]).square().sum() for k in want).sqrt()
    difference = sum((want[k] - got[k]).square().sum() for k in want).sqrt()
    assert update > 0 and difference <= 1e-4 * update
    want, got = merged([one_rank], "ema"), merged(results, "ema")
    moved = sum((want[k] - start[k.replace("reference.", "student.encoder.")]).square().sum() for k in want)
    difference = sum((want[k] - got[k]).square().sum() for k in want)
    assert moved > 0 and difference.sqrt() <= 1e-4 * moved.sqrt()
