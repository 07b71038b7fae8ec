"""Every layout trains the same: losses, gradients, weights and EMA against one rank, in fp32.

A new layout is one line of LAYOUTS. An ablation has a reference of its own, on one rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import parity
import pytest
import torch
import torch.distributed as dist
from launch import run

from nextvid_mcore.config import RoleParallel, RunConfig
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.recipes.ablations import ablate

STEPS = 3  # the third is of another stage, with more frames and another flow learning rate


@dataclass(frozen=True)
class Case:
    """A layout and what else differs from the reference run."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    overlap: str = "off"  # of the linears' exchanges with their products
    recompute: str = "none"
    rows: tuple[str, ...] = ()  # of the ablation tables, applied one after the other
    precision: str = "fp32"
    backend: str = "local"
    micro: int = 1  # clips of a micro-batch of one encoder replica
    placement: str = "colocated"
    reference_at: str = "encoder"
    edge: str = "direct"
    compile: bool = False  # the pieces between matrix products, on a GPU
    graphs: str = "off"
    generator: tuple[int | None, int | None] = (None, None)  # tensor, data
    predictor: tuple[int | None, int | None] = (None, None)
    decoder: tuple[int | None, int | None] = (None, None)

    @property
    def reference(self) -> str:
        """The case of one rank to compare with."""
        alone = Case(1, rows=self.rows, precision=self.precision, backend=self.backend)
        return next(name for name, case in LAYOUTS.items() if case == alone)


# Between them every switch that changes what travels: the joint predictor, an absent loss, its role and
# the reference's pass, the decoder that reads z and the noisy tokens by attention.
NO_GENERATION = ("table2_align",)
NO_ALIGNMENT = ("table2_gen", "table5_cross_self")

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
    "recompute-pieces": Case(1, recompute="pieces"),
    "pp2-recompute-pieces": Case(2, pipeline=2, recompute="pieces"),
    "tp2-sp-recompute-pieces": Case(2, tensor=2, sequence=True, recompute="pieces"),
    "tp2-sp-overlap": Case(2, tensor=2, sequence=True, overlap="on"),
    "tp2-sp-overlap-recompute-pieces": Case(2, tensor=2, sequence=True, overlap="on", recompute="pieces"),
    "tp2-generator-dp2": Case(2, tensor=2, micro=2, generator=(None, 2)),
    "tp2-sp-pp2-generator-dp2": Case(4, tensor=2, pipeline=2, sequence=True, micro=2, generator=(1, 2)),
    "two-1-1": Case(2, placement="two-groups"),
    "two-1-1-reference": Case(2, placement="two-groups", reference_at="generator"),
    "two-tp2-1": Case(3, tensor=2, placement="two-groups"),
    "two-dp2-1": Case(3, placement="two-groups"),
    "two-dp2-dp2": Case(4, placement="two-groups", generator=(1, 2)),
    "two-dp1-dp2": Case(3, micro=2, placement="two-groups", generator=(1, 2)),
    "two-tp2-sp-dp2": Case(4, tensor=2, sequence=True, micro=2, placement="two-groups", generator=(1, 2)),
    "two-tp2-tp2-sp": Case(4, tensor=2, sequence=True, placement="two-groups", generator=(2, 1)),
    "two-pp2-dp2": Case(4, pipeline=2, micro=2, placement="two-groups", generator=(1, 2)),
    "two-tp2-tp2-reference": Case(
        4, tensor=2, placement="two-groups", generator=(2, 1), reference_at="generator"
    ),
    "two-pp2-dp2-reference": Case(
        4, pipeline=2, micro=2, placement="two-groups", generator=(1, 2), reference_at="generator"
    ),
    "three-1-1-1": Case(3, placement="three-groups"),
    "three-1-1-2": Case(4, micro=2, placement="three-groups", decoder=(1, 2)),
    "three-pp2-1-1": Case(4, pipeline=2, placement="three-groups"),
    "three-1-1-tp2-reference": Case(
        4, sequence=True, placement="three-groups", decoder=(2, 1), reference_at="generator"
    ),
    "bridge-1-1": Case(2, placement="two-groups", edge="bridge"),
    "bridge-dp1-dp2": Case(3, micro=2, placement="two-groups", generator=(1, 2), edge="bridge"),
    "bridge-tp2-sp-dp2": Case(
        4, tensor=2, sequence=True, micro=2, placement="two-groups", generator=(1, 2), edge="bridge"
    ),
    "bridge-1-1-2": Case(4, micro=2, placement="three-groups", decoder=(1, 2), edge="bridge"),
    "no-generation": Case(1, rows=NO_GENERATION),
    "no-generation-tp2": Case(2, tensor=2, rows=NO_GENERATION),
    "no-alignment": Case(1, rows=NO_ALIGNMENT),
    "no-alignment-three": Case(3, placement="three-groups", rows=NO_ALIGNMENT),
    "no-generation-two-dp2": Case(3, placement="two-groups", rows=NO_GENERATION),
    "no-alignment-tp2-pp2-sp": Case(4, tensor=2, pipeline=2, sequence=True, rows=NO_ALIGNMENT),
}


def every(names: list[str]) -> dict[str, dict]:
    """All cases of one number of ranks in one start of the processes."""
    return {name: rank(LAYOUTS[name]) for name in names}


def configure(case: Case) -> RunConfig:
    config = parity.small(
        encoder=RoleParallel(tensor=case.tensor, pipeline=case.pipeline),
        placement=case.placement,
        reference=case.reference_at,
        edge=case.edge,
        sequence=case.sequence,
        tensor_overlap=case.overlap,
        recompute=case.recompute,
        **{
            name: RoleParallel(tensor=getattr(case, name)[0], data=getattr(case, name)[1])
            for name in ("generator", "predictor", "decoder")
        },
    ).altered(
        model={"backend": case.backend, "compile": case.compile},
        train={"micro_batch": case.micro, "precision": case.precision, "cuda_graphs": case.graphs},
    )
    for row in case.rows:
        config = ablate(config, row)
    return config


def rank(case: Case) -> dict:
    """Three steps; what this rank saw and holds."""
    config = configure(case)
    step = parity.built(config)
    seats, placement = step.seats, step.seats.placement
    home, micro = seats.home, placement.clips(seats.mine[0], case.micro)

    def state(pick) -> list[tuple]:
        out = []
        for name, module in step.model.roles().items():
            metadata = {"dp_cp_group": seats.of(name).collection.dp_cp}
            out += parity.shards(module.sharded_state_dict(prefix=f"{name}.", metadata=metadata), pick)
        return out

    schedule = parity.schedule(config)
    out: dict = {"start": state(lambda p: p), "results": [], "shapes": {}}
    for number in range(STEPS):
        point = schedule.at(number)
        mine = parity.clips(config, point, home.data_rank, home.layout.data, micro)
        out["micro_batches"] = len(mine)
        if number == 0:
            if case.graphs == "on":
                step.gradients(point, mine)  # so that what is looked at was recorded
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as profile:
                step.gradients(point, mine)
            out["traffic"] = collectives(profile)
            # under the distributed optimizer a rank's buffer holds the reduced gradient of its own share
            out["grads"] = reduced(step)
        out["results"].append(dataclasses.asdict(step.run(point, mine)))
    out["end"] = state(lambda p: p)
    if "student" in step.model.holds:
        metadata = {"dp_cp_group": seats.of("student").collection.dp_cp}
        reference = step.model.reference.sharded_state_dict(prefix="reference.", metadata=metadata)
        out["ema"] = parity.shards(reference, lambda p: p)
    if "reference" in step.model.holds:  # what the features are made with
        metadata = {"dp_cp_group": step.model.places["reference"].groups.dp_cp}
        run_with = step.model.reference.sharded_state_dict(prefix="reference.", metadata=metadata)
        out["reference"] = parity.shards(run_with, lambda p: p)
    out["shapes"] = {n: tuple(p.shape) for n, p in step.model.named_parameters()}
    step.close()
    return out


def reduced(step) -> list[tuple]:
    """Whole reduced gradients of this rank's parameters, gathered from the data ranks' shares."""
    out = []
    for name, role in step.roles.items():
        group = step.seats.of(name).collection.dp_cp
        for buffer in role.buffers:
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)
        entries = role.module.sharded_state_dict(prefix=f"{name}.", metadata={"dp_cp_group": group})
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


def merged(results: list[dict], name: str) -> dict[str, torch.Tensor]:
    return parity.assemble([r.get(name, []) for r in results])


@pytest.mark.parametrize("name", [name for name, case in LAYOUTS.items() if name != case.reference])
def test_layout_equals_one_rank(name: str) -> None:
    case = LAYOUTS[name]
    one_rank = runs(1)[0][case.reference]
    results = [each[name] for each in runs(case.ranks)]
    is_what_it_says(case, one_rank, results)
    trains_the_same(one_rank, results)


def is_what_it_says(case: Case, one_rank: dict, results: list[dict]) -> None:
    """Every rank holds and sends what its seat says."""
    placement = resolve_placement(configure(case), case.ranks)
    encoder = placement.encoder.layout
    assert all(r["micro_batches"] == parity.BATCH // (case.micro * encoder.data) >= 2 for r in results)
    for number, r in enumerate(results):
        held = {n.split(".")[0] for n in r["shapes"]}
        seats = placement.seats_of_rank(number)
        roles = {role for seat in seats for role in seat.roles}
        if "student" in roles:
            roles.add("reference")  # it makes the EMA
        if (
            not placement.separate
            and placement.encoder.coordinates(number)["pipeline"] < encoder.pipeline - 1
        ):
            roles -= {"predictor", "decoder"}
        assert held == roles
        for seat in seats:
            for role in set(seat.roles) & {"student", "predictor", "decoder"}:
                names = [n for n in r["shapes"] if n.startswith(role) and n.endswith("linear_fc1.weight")]
                whole = one_rank["shapes"][names[0]]
                assert r["shapes"][names[0]] == (whole[0] // seat.layout.tensor, whole[1])
                full = sum(n.startswith(role) and n.endswith("linear_fc1.weight") for n in one_rank["shapes"])
                assert len(names) == full if role != "student" or encoder.pipeline == 1 else len(names) < full
    traffic = set().union(*(r["traffic"] for r in results))
    split = any(seat.layout.tensor > 1 for seat in placement.seats)
    assert ("reduce_scatter_base" in traffic) == (case.sequence and split and case.overlap != "on")
    by_sends = case.overlap == "on" and not torch.cuda.is_available()  # GPUs copy
    assert ({"send", "recv"} <= traffic) == (encoder.pipeline > 1 or placement.separate or by_sends)


def trains_the_same(one_rank: dict, results: list[dict]) -> None:
    """Losses, norms, monitors, the first gradients, weights and EMA after three steps."""
    for reference, *others in zip(one_rank["results"], *(r["results"] for r in results), strict=True):
        for other in others:
            for key in ("loss", "loss_flow", "loss_align", "grad_norm"):
                want = reference[key]  # None: a loss that the ablation lacks
                assert other[key] == (want if want is None else pytest.approx(want, rel=1e-5)), key
            assert other["monitors"].keys() == reference["monitors"].keys()
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
    for key, value in merged(results, "reference").items():
        assert torch.equal(value, got[key]), f"{key} is not the EMA where it is run"
    moved = sum((want[k] - start[k.replace("reference.", "student.encoder.")]).square().sum() for k in want)
    difference = sum((want[k] - got[k]).square().sum() for k in want)
    assert moved > 0 and difference.sqrt() <= 1e-4 * moved.sqrt()


@pytest.mark.parametrize("name", [name for name, case in LAYOUTS.items() if case.placement != "colocated"])
def test_bytes_between_seats(name: str) -> None:
    """Counted from the tensors that were sent, against arithmetic: whatever the seats' replicas."""
    case = LAYOUTS[name]
    config = configure(case)
    model, n = config.model, config.model.tokens_per_frame
    whole = sum(math.prod(shape) for key, shape in encoder_shapes(case).items())
    for step, stage in enumerate([config.stages[0]] * 2 + [config.stages[1]]):
        t = model.token_frames(stage.frames)
        values = (t - 1) * sum(config.mask.counts(n)) * model.predictor.width  # the projected context
        features = 0
        if model.align and case.reference_at == "encoder":
            features = (t - 1) * n * model.encoder.width  # of the predicted frames
        if case.placement == "three-groups":
            values += config.mask.masks * (t - 1) * n * model.predictor.width  # z
        back = values + (features if case.edge == "bridge" else 0)
        away = model.align and case.reference_at == "generator"
        for each in runs(case.ranks):
            assert each[name]["results"][step]["crossed"] == {
                "edge_bytes_per_clip": {"forward": 4 * (values + features), "backward": 4 * back},
                "reference_bytes": 4 * whole if away else 0,
            }


def encoder_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The reference encoder's whole tensors."""
    shapes = runs(1)[0][case.reference]["shapes"]
    return {key: shape for key, shape in shapes.items() if key.startswith("reference.")}


def test_nothing_crosses_where_all_sit_together() -> None:
    assert all(result["crossed"] == {} for result in runs(1)[0]["one-rank"]["results"])
