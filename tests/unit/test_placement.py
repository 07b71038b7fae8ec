"""Placements: who sits where, what is derived, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, ParallelConfig, RoleParallel, RunConfig
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.placement import resolve_placement, settled

R = RoleParallel


def run_config(micro: int = 4, recipe: str = "vit_g", **parallel: Any) -> RunConfig:
    config = recipes.get(recipe)
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(**parallel),
        train=dataclasses.replace(config.train, micro_batch=micro, global_batch=96),
    )


def layouts(config: RunConfig, world: int) -> dict[str, tuple[int, int, int, int]]:
    """name -> (first rank, tensor, pipeline, data)."""
    seats = resolve_placement(config, world).seats
    return {s.name: (s.first_rank, s.layout.tensor, s.layout.pipeline, s.layout.data) for s in seats}


def test_colocated_is_one_seat():
    assert layouts(run_config(encoder=R(tensor=2)), 8) == {"all": (0, 2, 1, 4)}


def test_colocated_pipeline_puts_the_generator_on_the_last_stage():
    found = layouts(run_config(encoder=R(tensor=2, pipeline=2)), 8)
    assert found == {"encoder": (0, 2, 2, 2), "generator": (4, 2, 1, 2)}


def test_colocated_generator_can_share_the_tensor_ranks_batch():
    config = run_config(encoder=R(tensor=2), generator=R(data=8))
    assert layouts(config, 8) == {"encoder": (0, 2, 1, 4), "generator": (0, 1, 1, 8)}
    placement = resolve_placement(config, 8)
    assert [placement.clips(seat, 4) for seat in placement.seats] == [4, 2]


def test_every_stage_shares_its_own_micro_batch():
    config = run_config(placement="two-groups", encoder=R(tensor=2), generator=R(data=2))
    stages = tuple(
        dataclasses.replace(stage, micro_batch=micro)
        for stage, micro in zip(config.stages, (8, 4, 4, 1), strict=True)
    )
    config = config.altered(stages=stages, train={"micro_batch": None})
    placement = resolve_placement(config, 6)
    generator = placement.seat_of("decoder")
    assert [placement.clips(generator, config.micro_batch(stage)) for stage in stages] == [8, 4, 4, 1]
    with pytest.raises(ConfigError, match=r"micro-batch of 1 x encoder data 1 = 1 clips \(stage cooldown\)"):
        resolve_placement(config, 4)


def test_two_groups():
    config = run_config(placement="two-groups", encoder=R(tensor=2), generator=R(data=2))
    assert layouts(config, 10) == {"encoder": (0, 2, 1, 4), "generator": (8, 1, 1, 2)}
    placement = resolve_placement(config, 10)
    assert placement.seat_of("reference").name == "encoder"
    assert [placement.clips(seat, 4) for seat in placement.seats] == [4, 8]
    beside = resolve_placement(dataclasses.replace(config, parallel=dataclasses.replace(
        config.parallel, reference="generator")), 10)  # fmt: skip
    assert beside.seat_of("reference").name == "generator"
    assert beside.world == 10


def test_three_groups():
    config = run_config(placement="three-groups", encoder=R(pipeline=2), decoder=R(data=2))
    found = layouts(config, 7)
    assert found == {"encoder": (0, 1, 2, 2), "predictor": (4, 1, 1, 1), "decoder": (5, 1, 1, 2)}


def test_coordinates_run_over_tensor_data_pipeline():
    seat = resolve_placement(run_config(encoder=R(tensor=2, pipeline=2)), 8).seats[0]
    assert [tuple(seat.coordinates(rank).values()) for rank in seat.ranks] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1),
    ]  # fmt: skip
    assert seat.layout == Layout(2, 2, 2)


@pytest.mark.parametrize(
    ("world", "parallel", "words"),
    [
        (8, dict(encoder=R(tensor=4)), "22 heads can't be split over tensor parallel 4; it can be 1, 2"),
        (8, dict(generator=R(data=3)), "generator: tensor 1 x data 3 can't share"),
        (8, dict(encoder=R(tensor=2), generator=R(tensor=1, data=4)), "can't share the ranks"),
        (8, dict(predictor=R(data=2)), "--parallel.predictor says nothing"),
        (8, dict(placement="two-groups", decoder=R(data=2)), "--parallel.decoder says nothing"),
        (8, dict(placement="two-groups", generator=R(pipeline=2)), "only the encoder is pipelined"),
        (8, dict(placement="two-groups", generator=R(tensor=5)), "12 heads can't be split over tensor"),
        (
            8,
            dict(placement="two-groups", encoder=R(tensor=2), generator=R(data=3)),
            "leave 5 for the encoder",
        ),
        (4, dict(placement="two-groups", encoder=R(data=2), generator=R(data=3)), "start at least 5 ranks"),
        (
            7,
            dict(placement="two-groups", encoder=R(data=2), generator=R(data=5)),
            "can't be shared by data 5",
        ),
        (5, dict(placement="two-groups", generator=R(data=2)), "one number must be a multiple of the other"),
        (8, dict(reference="generator"), "goes with --parallel.placement two-groups"),
    ],
)
def test_refusals_name_the_numbers(world: int, parallel: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        resolve_placement(run_config(**parallel), world)


@pytest.mark.parametrize(("clips", "data"), [(6, (2, 4)), (7, (1, 2))])
def test_steps_that_no_micro_batch_shares_are_refused_before_they_begin(clips: int, data: tuple[int, int]):
    """Nobody gave a micro-batch: so the words are about the step, and not about one that wasn't asked for."""
    config = run_config(placement="two-groups", encoder=R(data=data[0]), generator=R(data=data[1]))
    stages = tuple(dataclasses.replace(s, micro_batch=None, max_micro_batch=2) for s in config.stages)
    config = config.altered(stages=stages, train={"micro_batch": None, "global_batch": clips})
    said = f"of 2 or less lets encoder data {data[0]} and its own data {data[1]} share the {clips} clips"
    with pytest.raises(ConfigError, match=said):
        settled(config, sum(data))


def test_ragged_masks_stay_together():
    config = run_config(placement="two-groups")
    config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, mode="packed"))
    with pytest.raises(ConfigError, match="changing length"):
        resolve_placement(config, 4)


def test_three_groups_need_a_decoder():
    config = run_config(placement="three-groups")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, generate=False))
    with pytest.raises(ConfigError, match="use two-groups"):
        resolve_placement(config, 4)
