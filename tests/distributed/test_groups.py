"""Process groups of a layout, and layouts that cannot work."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from launch import RankFailure, run, shared

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, Fp8Config, RoleParallel
from nextvid_mcore.models import fp8, specs
from nextvid_mcore.parallel import groups


def members(layout):
    groups.init_distributed(60)
    built = groups.build_groups(layout, timeout=60)
    groups.seed_trackers(3, built)
    c = built.collection
    total = torch.ones(1) * dist.get_rank()
    dist.all_reduce(total, group=c.dp)
    names = ("tp", "dp", "pp", "mp", "cp", "dp_cp", "tp_dp_cp", "intra_dist_opt")
    return {n: dist.get_process_group_ranks(getattr(c, n)) for n in names} | {
        "dp_sum": total.item(),
        "place": (built.tensor_rank, built.data_rank, built.pipeline_rank, built.last_stage),
    }


def test_rank_order_is_tensor_data_pipeline():
    out = shared(4).run(members, groups.Layout(tensor=2, data=2))
    assert [o["tp"] for o in out] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [o["dp"] for o in out] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [o["dp_sum"] for o in out] == [2, 4, 2, 4]
    assert out[3]["place"] == (1, 1, 0, True)
    assert all(o["intra_dist_opt"] == [0, 1, 2, 3] and len(o["cp"]) == 1 for o in out)


def asked_by_delayed(layout):
    """Whose largest values a network in FP8 `delayed` takes on this rank."""
    groups.init_distributed(60)
    built = groups.build_groups(layout, timeout=60)
    settings = fp8.settings(Fp8Config(all="delayed"), "student")
    run = recipes.get("vit_l")
    config = specs.transformer_config(run.model.encoder, run.model, specs.Split(layout.tensor, fp8=settings))
    with mock.patch.object(specs, "TransformerBlock"):
        specs.build_block(config, "layer", 1, None, built.collection)
    return dist.get_process_group_ranks(config.amax_group)


def test_delayed_asks_no_data_rank():
    found = shared(4).run(asked_by_delayed, groups.Layout(tensor=2, data=2))
    assert found == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert shared(2).run(asked_by_delayed, groups.Layout(data=2)) == [[0], [1]]


def test_pipeline_groups():
    out = shared(2).run(members, groups.Layout(pipeline=2))
    assert [o["pp"] for o in out] == [[0, 1], [0, 1]] and [o["mp"] for o in out] == [[0, 1], [0, 1]]
    assert [o["place"][2:] for o in out] == [(0, False), (1, True)]


def test_a_layout_larger_than_the_world_names_the_numbers():
    with pytest.raises(ConfigError, match="needs 4 ranks, but 1 were started"):
        members(groups.Layout(tensor=2, data=2))


def test_a_dead_rank_ends_the_group():
    with pytest.raises(RankFailure, match="rank 1 gave up"):
        run(one_rank_raises, 2, timeout=60)


def one_rank_raises():
    groups.init_distributed(60)
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 gave up")
    dist.barrier()


def with_parallel(config, world, sequence=False, **role):
    parallel = dataclasses.replace(config.parallel, encoder=RoleParallel(**role), sequence=sequence)
    return groups.resolve_layout(dataclasses.replace(config, parallel=parallel), world)


@pytest.mark.parametrize(
    ("world", "role", "message"),
    [
        (4, {"tensor": 4}, "22 heads can't be split over tensor parallel 4; it can be 1, 2"),
        (11, {"tensor": 11}, "MLP width 6144 can't be split over tensor parallel 11"),
        (3, {"tensor": 2}, "3 ranks can't be divided into groups of tensor 2"),
        (8, {"tensor": 2, "data": 3}, "needs 6 ranks, but 8 were started"),
        (82, {"pipeline": 41}, "40 encoder layers can't be split over 41"),
        (7, {}, "3072 can't be shared equally by data parallel 7; use data parallel 6"),
    ],
)
def test_impossible_layouts(world, role, message):
    with pytest.raises(ConfigError, match=message):
        with_parallel(recipes.get("vit_g"), world, **role)


def test_sequence_parallel_needs_divisible_sequences_and_fixed_masks():
    config = recipes.get("vit_l")
    assert with_parallel(config, 2, sequence=True, tensor=2) == groups.Layout(2, 1, 1, True)
    assert not with_parallel(config, 2, sequence=True).sequence
    odd = dataclasses.replace(config, mask=dataclasses.replace(config.mask, keep=(0.375, 47 / 256)))
    with pytest.raises(ConfigError, match="the student's sequence of 1001 tokens can't be split over"):
        with_parallel(odd, 2, sequence=True, tensor=2)
    packed = dataclasses.replace(config, mask=dataclasses.replace(config.mask, mode="packed"))
    with pytest.raises(ConfigError, match="mask mode packed"):
        with_parallel(packed, 2, sequence=True, tensor=2)
    assert with_parallel(packed, 2, tensor=2).tensor == 2
