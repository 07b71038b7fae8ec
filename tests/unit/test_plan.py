"""The plan: what cannot run is refused with its numbers, and the text says what a run holds and costs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from nextvid_mcore import cli, flops, pretrain, recipes
from nextvid_mcore.config import ConfigError, RoleParallel
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.memory import rank_memory
from nextvid_mcore.parallel.placement import resolve_placement, settled
from nextvid_mcore.parallel.plan import WIDTH, check, describe


def plan(line: str, world: int, dry_run: bool = True):
    config, _ = cli.parse([*line.split(), "--dry-run"])
    return check(config, world, dry_run)


@pytest.mark.parametrize(
    ("line", "world", "said"),
    [
        ("vit_g --parallel.encoder.tensor 4", 8, "encoder: 22 heads can't be split over tensor parallel 4"),
        ("vit_g --parallel.encoder.tensor 11", 11, "MLP width 6144 can't be split over tensor parallel 11"),
        ("vit_l --parallel.encoder.tensor 8", 8, "predictor: 12 heads can't be split over tensor parallel 8"),
        ("vit_l --parallel.encoder.tensor 2", 7, "7 ranks can't be divided into groups of tensor 2"),
        ("vit_l --parallel.encoder.data 3", 4, "needs 3 ranks, but 4 were started"),
        (
            "vit_l --train.global-batch 100 --stages.0.micro-batch 16",
            8,
            "stage warmup: global batch 100 is not divisible by micro batch 16 x data parallel 8",
        ),
        (
            "vit_l --stages.2.micro-batch 32",
            192,
            "32 x data parallel 192 = 6144; change one of the three, such as --stages.2.micro-batch",
        ),
        (
            "vit_g --parallel.encoder.tensor 2",
            1000,
            "batch 3072 can't be shared equally by data parallel 500; use data parallel 384 (768 ranks)",
        ),
        ("vit_l --train.global-batch 100", 8, "equally by data parallel 8; use data parallel 5 (5 ranks)"),
        ("vit_l --train.micro-batch 3 --train.global-batch 4", 1, "such as --train.micro-batch"),
        ("tiny --parallel.encoder.pipeline 5", 5, "4 encoder layers can't be split over 5 pipeline stages"),
        ("tiny --train.start-stage nowhere", 1, "no stage 'nowhere'"),
        ("tiny --train.steps 121", 1, "121 is more than the 120 steps"),
        ("tiny --parallel.encoder.tensor 2 --mask.mode packed --parallel.sequence", 2, "mask mode packed"),
        ("tiny --parallel.encoder.tensor 2 --parallel.tensor-overlap on", 2, "add --parallel.sequence"),
        ("tiny --parallel.sequence --parallel.tensor-overlap on", 1, "such as --parallel.encoder.tensor 2"),
    ],
)
def test_impossible_runs_name_the_numbers(line: str, world: int, said: str):
    with pytest.raises(ConfigError) as error:
        plan(line, world)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_sequence_that_cannot_be_split_is_named():
    # 2 token frames: the student sees 1 x (25 + 12) = 37 tokens
    line = (
        "tiny --parallel.encoder.tensor 2 --parallel.sequence --model.image-size 80 --stages.0.frames 4 "
        "--mask.keep 0.25 0.12"
    )
    with pytest.raises(ConfigError, match="student's sequence of 37 tokens"):
        plan(line, 2)


def test_a_real_start_asks_for_what_a_dry_run_does_not():
    assert plan("vit_l --model.backend te", 8).encoder.layout.data == 8
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--model.backend local"):
            plan("vit_l --model.backend te", 8, dry_run=False)
    with pytest.raises(ConfigError, match="--target.checkpoint"):
        plan("vit_l", 8, dry_run=False)
    assert plan("tiny", 1, dry_run=False).encoder.layout == Layout()


def test_memory_that_no_gpu_has_and_waiting_that_costs_hours_are_said():
    split = "--parallel.placement three-groups --parallel.predictor.data 8 --parallel.decoder.data 8"
    plain, crowded = (
        describe(cli.parse(["vit_l", *line.split(), "--dry-run", "--world-size", "64"])[0], 64)
        for line in ("", split)
    )
    assert "no GPU of 80 GB" not in plain and "30.9 hours on 64 GPUs" in plain
    words = " ".join(crowded.split())
    assert "no GPU of 80 GB has that: predictor 90, decoder 217. Lower --stages.0.micro-batch" in words
    hours = [float(re.search(r"about ([\d,]+) GPU-hours", x)[1].replace(",", "")) for x in (plain, crowded)]
    speed = float(re.search(r"schedule (0\.\d+) of the speed", crowded)[1])
    assert hours[0] / hours[1] == pytest.approx(speed, abs=0.01) and "peak and the waits below" in crowded
    assert max(map(len, crowded.splitlines())) <= WIDTH


def gpu_hours(line: str, world: int = 96) -> float:
    """As the plan says them."""
    text = describe(cli.parse([*line.split(), "--dry-run"])[0], world)
    return float(re.search(r"about ([\d,]+) GPU-hours", text)[1].replace(",", ""))


def test_hours_are_of_the_steps_that_the_run_takes():
    whole, first = gpu_hours("vit_l"), gpu_hours("vit_l --train.steps 60000")
    rest = gpu_hours("vit_l --stages.2.steps 60000 --start-stage stable2")
    assert first + rest == pytest.approx(whole, abs=2)
    assert gpu_hours("vit_l --start-stage cooldown") < 0.2 * whole
    config = recipes.get("table2_gen")  # 15,000 of 132,000 steps
    stage = config.stages[0]
    clip = flops.clip_flops(config, stage, executed=True).total + flops.target_flops(config, stage)
    assert gpu_hours("table2_gen") == pytest.approx(15_000 * 3072 * clip / (0.4 * 989e12) / 3600, abs=1)


def test_memory_is_of_a_stage_that_the_run_comes_to():
    for steps, stage in (("60000", "stable2"), ("40000", "warmup")):
        text = describe(cli.parse(["vit_l", "--dry-run", "--train.steps", steps])[0], 96)
        assert f"at its largest (stage {stage})" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vit_l",
            ("encoder 303.9M", "predictor 22.1M", "decoder 32.7M", "about 1,975 GPU-hours, 20.6 hours on 96"),
        ),
        ("vit_h", ("encoder 631.6M", "predictor 22.3M", "decoder 32.7M")),
        ("vit_g", ("encoder 1,012.2M", "predictor 22.4M", "decoder 32.7M")),
    ],
)
def test_the_text_has_the_papers_numbers(name: str, said: tuple[str, ...]):
    text = describe(recipes.get(name), 96)
    for words in (*said, "132,000 steps", "377.9M clips", "830.5B tokens", "data 96"):
        assert words in text
    assert max(map(len, text.splitlines())) <= WIDTH
    passes = {"vit_l": ("2 x 16", "1 x 32"), "vit_h": ("4 x 8", "2 x 16"), "vit_g": ("4 x 8", "2 x 16")}[name]
    for stage, each in zip(("warmup", "stable2", "cooldown"), (*passes, "2 x 4"), strict=True):
        assert re.search(rf"{stage} .* {each} ", text), text
    assert "96 ranks" in text and f"{passes[0][0]} micro-batches x " in text


@pytest.mark.parametrize("line", ["vit_l", "vit_h", "vit_g", "vit_g --parallel.encoder.tensor 2"])
@pytest.mark.parametrize("world", [8, 96, 192, 384, 768])
def test_without_a_setting_stages_take_the_largest_micro_batches_that_share_a_step(line: str, world: int):
    config, _ = cli.parse([*line.split(), "--dry-run"])
    found, notes = settled(config, world)
    text, data = describe(config, world), check(config, world, dry_run=True).encoder.layout.data
    assert max(map(len, text.splitlines())) <= WIDTH
    for before, stage in zip(config.stages, found.stages, strict=True):
        fits = [m for m in range(1, before.max_micro_batch + 1) if stage.batch % (m * data) == 0]
        assert stage.micro_batch == found.micro_batch(stage) == max(fits)
        assert f"{stage.batch // data // max(fits)} x {max(fits)} " in text
        named, less = (
            f"stage {stage.name}: micro-batches of {max(fits)}, not ",
            max(fits) < before.max_micro_batch,
        )
        assert (named in text) == less == any(note.startswith(named) for note in notes)


def test_micro_batches_that_are_asked_for_stay_and_separate_seats_share_them():
    asked, _ = cli.parse("vit_l --dry-run --stages.2.micro-batch 8 --stages.3.max-micro-batch 2".split())
    found, notes = settled(asked, 96)
    assert [stage.micro_batch for stage in found.stages] == [16, 16, 8, 2] and notes == []
    assert settled(found, 96) == (found, [])
    every = settled(asked.altered(train={"micro_batch": 2}), 96)[0]
    assert [every.micro_batch(stage) for stage in every.stages] == [2, 2, 2, 2]
    # an encoder's 3 clips would not be shared by a generator's two replicas
    split = "tiny --dry-run --train.global-batch 6 --parallel.placement two-groups"
    found, notes = settled(cli.parse([*split.split(), "--parallel.generator.data", "2"])[0], 3)
    assert {stage.micro_batch for stage in found.stages} == {2} and len(notes) == 4


def test_memory_adds_up_over_the_ranks():
    """What all ranks hold is what the model has; the optimizer's state is held once."""
    config = recipes.get("vit_g")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, global_batch=192),
        parallel=dataclasses.replace(config.parallel, encoder=RoleParallel(tensor=2, pipeline=4)),
    )
    count = flops.parameters(config.model, flops.target_channels(config))
    trained = count.student + count.predictor + count.decoder
    placement = resolve_placement(config, 96)
    data = placement.encoder.layout.data
    assert data == 12
    ranks = [rank_memory(config, placement, rank, config.stages[0]) for rank in range(96)]
    assert sum(m.weights for m in ranks) == pytest.approx(data * 2 * trained)
    assert sum(m.gradients for m in ranks) == pytest.approx(data * 4 * trained)
    assert sum(m.optimizer for m in ranks) == pytest.approx(12 * trained + 4 * count.encoder)
    assert sum(m.reference for m in ranks) == pytest.approx(data * 2 * count.encoder)
    full = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, recompute="full"))
    lean = rank_memory(full, placement, 0, config.stages[0])
    assert lean.activations < ranks[0].activations / 8 and lean.weights == ranks[0].weights


def test_the_program_prints_its_plan_without_torchrun_data_or_gpu(tmp_path):
    command = [sys.executable, "-m", "nextvid_mcore.pretrain", "tiny", "--dry-run", "--world-size", "2"]
    command += ["--train.micro-batch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "encoder 0.5M" in done.stdout and "2 ranks = tensor 1 x data 2" in done.stdout
    done = subprocess.run(
        [*command, "--parallel.encoder.tensor", "3"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "4 heads can't be split over tensor parallel 3; it can be 1, 2, 4" in done.stderr


@pytest.mark.parametrize("words", [["--dry-run"], ["--help"]])
def test_of_torchruns_processes_one_speaks(words: list[str], monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert pretrain.main(["tiny", *words]) == 0
        assert bool(capsys.readouterr().out) == (rank == "0")


def test_wandb_that_is_asked_for_is_there(monkeypatch):
    monkeypatch.setattr("nextvid_mcore.parallel.plan.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="scripts/install.sh train,wandb"):
        plan("tiny --wandb.enabled", 1, dry_run=False)
    assert plan("tiny", 1, dry_run=False) and plan("tiny --wandb.enabled", 1)


def test_recorded_passes_keep_the_features_of_one_micro_batch():
    config = recipes.get("vit_g")
    placement = resolve_placement(config, 8)
    one = 16 * 8 * 256 * 1408 * 2  # clips, token frames, tokens, width in bf16
    for graphs, waiting in (("auto", 1), ("on", 1), ("off", 3072 // 16 // 8)):
        each = config.altered(train={"cuda_graphs": graphs})
        assert rank_memory(each, placement, 0, config.stages[2]).features == waiting * one


@pytest.mark.parametrize("recipe", recipes.names())
def test_a_stages_micro_batch_is_a_setting_of_every_recipe(recipe: str) -> None:
    """No recipe overrides it as --train.micro-batch does."""
    config, _ = cli.parse([recipe, "--dry-run", "--stages.1.micro-batch", "1"])
    assert [config.micro_batch(stage) for stage in config.stages].count(1) == 1
    assert config.micro_batch(config.stages[1]) == 1
