"""The ablations' recipes: what each row sets, and its parameters and FLOPs by formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_flops import attend
from test_models import CHANNELS, build, small
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nextvid_mcore import cli, flops, recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.parallel.groups import Layout, build_groups, init_distributed, seed_trackers
from nextvid_mcore.parallel.plan import WIDTH, describe
from nextvid_mcore.recipes.ablations import ROWS, ablate


@pytest.fixture(scope="module")
def groups():
    init_distributed()
    groups = build_groups(Layout())
    seed_trackers(0, groups)
    return groups.collection


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tiny", "vit_l"])
@pytest.mark.parametrize(
    "row", {ablate(small(), row).model: row for row in ROWS}.values()
)  # each network once
def test_parameters_by_formula(groups, base, row):
    config = ablate(recipes.get(base), row)
    with torch.device("meta"):
        model = build(config, groups)

    def count(name: str) -> int:
        module = getattr(model, name, None)
        return sum(p.numel() for p in module.parameters()) if module else 0

    formula = flops.parameters(config.model, CHANNELS)
    assert (formula.student, formula.predictor, formula.decoder) == tuple(
        map(count, ("student", "predictor", "decoder"))
    )


def counted(work) -> int:
    """FLOPs of forward and backward of what `work` runs on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        work(lambda rows, i, o: functional.linear(torch.empty(rows, i), torch.empty(o, i)))
    return 3 * counter.get_total_flops()


@pytest.mark.parametrize("condition", ["cross", "cross_self"])
def test_decoder_flops(condition):
    config = recipes.get("tiny").altered(model={"condition": condition})
    stage, n, E, C = config.stages[0], 64, 48, flops.target_channels(config)

    def work(linear) -> None:
        for _ in range(2 * 3 * stage.tau_samples):  # masks x predicted frames x tau samples
            linear(1, 256, E), linear(1, E, E), linear(1, E, 2 * E)
            linear(n, C, E), linear(n, E, C)
            keys = n if condition == "cross" else 2 * n
            for _ in range(2):
                linear(1, E, 6 * E), linear(n, E, E), linear(keys, E, 2 * E), linear(n, E, E)
                linear(n, E, 192), linear(n, 192, E)
                attend(n, keys, E)

    assert flops.clip_flops(config, stage, executed=True).decoder == counted(work)


def test_joint_predictor_flops():
    config = recipes.get("tiny").altered(model={"context": "joint"})
    stage, n, E, D, p = config.stages[0], 64, 48, 96, 3

    def work(linear) -> None:
        for v in config.mask.counts(n):
            linear(p * n, E, D)
            for _ in range(2):
                tokens = p * n + p * v
                linear(tokens, E, 3 * E), linear(tokens, E, E), linear(tokens, E, 192), linear(tokens, 192, E)
                for frame in range(1, p + 1):
                    attend(v, frame * v, E)  # context of frame - 1
                    attend(n, frame * v + n, E)  # queries of frame

    assert flops.clip_flops(config, stage, executed=True).predictor == counted(work)


def test_flops_of_what_is_off_are_none():
    full = recipes.get("vit_l")
    stage = full.stages[0]
    want = flops.clip_flops(full, stage)
    gen, align = (flops.clip_flops(ablate(full, r), stage) for r in ("table2_gen_ciso", "table2_align_ciso"))
    assert (gen.reference, gen.decoder, gen.student) == (0, want.decoder, want.student)
    assert (align.reference, align.decoder, align.predictor) == (want.reference, 0, want.predictor)
    assert want.predictor - gen.predictor == pytest.approx(3 * 2 * 2 * 384 * 1024 * 7 * 256)  # align_head
    assert flops.target_flops(ablate(full, "table2_align"), stage) == 0


# Recipes -----------------------------------------------------------------------------------------


def flat(value: object, name: str = "") -> dict[str, object]:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, tuple):
        value = {str(i): x for i, x in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    parts = (flat(x, f"{name}.{k}".lstrip(".")) for k, x in value.items())
    return {k: x for part in parts for k, x in part.items()}


NO_ALIGN = {"model.align": False}
WANTED = {
    "table2_gen": NO_ALIGN | {"model.context": "joint"},
    "table2_gen_ciso": NO_ALIGN,
    "table2_align": {"model.generate": False, "model.context": "joint"},
    "table2_align_ciso": {"model.generate": False},
    "table2_full": {},
    "table3_pixels": {"target.kind": "pixels"},
    "table3_siglip2": {"target.kind": "siglip2"},
    "table3_cosmos": {"target.kind": "cosmos"},
    "table3_va_vae": {},
    "table4_no_mask": NO_ALIGN | {"mask.mode": "none"},
    "table4_mask": NO_ALIGN,
    "table5_cross_self": NO_ALIGN | {"model.condition": "cross_self"},
    "table5_cross": NO_ALIGN | {"model.condition": "cross"},
    "table11_tau1": {"stages.0.tau_samples": 1, "stages.1.tau_samples": 1},
    "table11_tau4": {"stages.2.tau_samples": 4, "stages.3.tau_samples": 4},  # never reached
    "table11_tau1_30k": {"stages.0.tau_samples": 1, "stages.1.tau_samples": 1},
    "table11_tau4_30k": {"stages.2.tau_samples": 4, "stages.3.tau_samples": 4},
    "table12_no_ema": {"optim.ema": 0.0},
    "table12_ema": {},
}


@pytest.mark.parametrize("row", ROWS)
def test_a_recipe_changes_what_its_row_says(row):
    config, full = recipes.get(row), flat(recipes.get("vit_l"))
    changed = {k: v for k, v in flat(config).items() if v != full[k]}
    steps = 30_000 if row.endswith("30k") else 15_000
    assert changed == WANTED[row] | {"recipe": row, "train.steps": steps}
    assert flat(config).keys() == full.keys()
    tiny = recipes.get("tiny")
    small = flat(ablate(tiny, row))
    assert {k for k, v in small.items() if v != flat(tiny)[k]} <= WANTED[row].keys() | {
        "recipe",
        "target.kind",
    }
    assert small["recipe"] == f"tiny_{row}" and small["train.steps"] is None


@pytest.mark.parametrize("row", ROWS)
def test_a_recipes_dry_run(row):
    config, options = cli.parse([row, "--dry-run", "--world-size", "96"])
    if config.target.kind in ("siglip2", "cosmos"):  # their files say how many values a token has
        with pytest.raises(ConfigError, match="needs --target.checkpoint DIR"):
            describe(config, options.world_size)
        return
    text = describe(config, options.world_size)
    assert f"Model {row}" in text and max(map(len, text.splitlines())) <= WIDTH
    assert ("\n  decoder " in text) == config.model.generate
    assert "this run takes steps 1 to " + ("30,000" if row.endswith("30k") else "15,000") in text


def test_switches_are_flags():
    config, _ = cli.parse(["tiny", "--model.generate", "False", "--model.context", "joint", "--dry-run"])
    assert not config.model.generate and config.model.context == "joint"


def test_impossible_switches_say_so():
    for change, message in (
        ({"generate": False, "align": False}, "both off"),
        ({"generate": False, "condition": "cross"}, "condition cross is a kind of decoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            small().altered(model=change)
    with pytest.raises(ConfigError, match="no ablation 'table9'; there are table2_gen,"):
        ablate(small(), "table9")
    with pytest.raises(ConfigError, match="decay in"):
        dataclasses.replace(small().optim, ema=1.5)
