"""The command line: what each spelling means, and that a mistake is one message and code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextvid_mcore import cli, pretrain, recipes
from nextvid_mcore.config import ConfigError, SetConfig

DRY = "--dry-run"


def parse(line: str):
    return cli.parse(line.split())


def test_defaults_are_the_recipes():
    for name in recipes.names():
        config, options = cli.parse([name, DRY])
        assert config == recipes.get(name)
        assert options.dry_run and options.out is None


def test_settings_reach_every_part():
    config, options = parse(
        "tiny --dry-run --world-size 4 --train.global-batch 16 --train.micro_batch 2 --stages.0.steps=3 "
        "--stages.3.flow-lr None --parallel.encoder.tensor 2 --mask.keep 0.25 0.5 --data.sets a=1 b=3.5"
    )
    assert options.world_size == 4
    assert (config.train.global_batch, config.train.micro_batch) == (16, 2)
    assert config.stages[0].steps == 3 and config.stages[3].flow_lr is None
    assert config.stages[1] == recipes.get("tiny").stages[1]
    assert config.parallel.encoder.tensor == 2
    assert config.mask.keep == (0.25, 0.5)
    assert config.data.sets == (SetConfig("a", 1.0), SetConfig("b", 3.5))


def test_short_spellings_and_recipe_anywhere():
    config, _ = parse("--dry-run --start-stage cooldown tiny --init-from=runs/a")
    assert config.train.start_stage == "cooldown"
    assert config.train.init_from == "runs/a"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--wandb.enabled", True),
        ("--wandb.enabled True", True),
        ("--wandb.enabled=1", True),
        ("--wandb.enabled --no-wandb", False),
        ("--wandb.enabled --wandb.enabled False", False),
        ("--wandb.enabled --wandb.no-enabled", False),
        ("--wandb.enabled --no-wandb.enabled", False),
    ],
)
def test_switch_spellings(words: str, value: bool):
    assert parse(f"tiny --dry-run {words}")[0].wandb.enabled is value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "name a recipe first"),
        ("vitl --dry-run", "did you mean vit_l?"),
        (
            "tiny --train.global-bath 8",
            "unknown setting --train.global-bath; did you mean --train.global-batch",
        ),
        ("tiny --outt x", "did you mean --out?"),
        ("tiny stray --dry-run", "unknown setting stray"),
        ("tiny --train.steps x", "--train.steps takes {None}|INT, got 'x'"),
        ("tiny --train.seed 1.5", "--train.seed takes a whole number, got '1.5'"),
        ("tiny --data.fps x", "--data.fps takes a number, got 'x'"),
        ("tiny --dry-run --optim.clip 0", "optim clip must be positive, got 0.0; 1e9 clips nothing"),
        ("tiny --dry-run --optim.beta2 1", "optim beta2 lies in [0, 1), got 1.0"),
        ("tiny --dry-run --optim.max-skipped 0", "optim max skipped must be 1 or more, got 0"),
        ("tiny --dry-run --loss.flow -1", "loss flow is a weight of 0 or more, got -1.0"),
        ("tiny --dry-run --loss.flow 0 --loss.align 0", "loss flow and align are both 0"),
        ("tiny --dry-run --loss.align 0 --model.generate False", "loss align is 0 and generate is off"),
        ("tiny --dry-run --loss.flow 0 --model.align False", "loss flow is 0 and align is off"),
        ("tiny --dry-run --stages.0.lr-start nan", "stage warmup: lr_start must be 0 or more, got nan"),
        ("tiny --dry-run --data.prefetch 0", "prefetch must be 1 or more, got 0"),
        ("tiny --dry-run --data.timeout 0", "data timeout must be positive, got 0.0"),
        ("tiny --dry-run --data.crop-aspect 0 1", "crop aspect must be a rising positive range"),
        ("tiny --dry-run --model.rope-base 0", "model rope_base must be positive, got 0.0"),
        ("tiny --dry-run --model.init-std inf", "model init_std must be a finite number, got inf"),
        ("tiny --dry-run --mask.aspect 0.75 inf", "mask aspect must be a finite number, got inf"),
        ("tiny --dry-run --data.sets a=inf b=1", "data sets weight must be a finite number, got inf"),
        (
            "tiny --dry-run --train.seed 18446744073709551616",
            "seed must be 0 or more and below 2**63, got 1844",
        ),
        ("tiny --train.steps -4", "train steps must be positive, got -4"),
        ("tiny --train.steps", "Missing value for argument '--train.steps'"),
        ("tiny --mask.mode foo", "invalid choice 'foo'"),
        ("tiny --dry-run --mask.keep 0.3 0.2", "mask keep 0.3 of 64 tokens is 19.2"),
        ("tiny --dry-run --stages.2.frames 7", "7 frames: must be a multiple of the tubelet size 2"),
        ("tiny --dry-run --model.decoder.depth 0", "decoder depth must be positive, got 0"),
        ("tiny --dry-run --model.encoder.width 97", "encoder width 97 is not divisible by 4 heads"),
        (
            "tiny --dry-run --data.sets k400",
            "--data.sets: a data set is given as NAME=WEIGHT (k400=0.4), got",
        ),
        ("tiny --dry-run --train.progress=maybe", "is a switch"),
        ("tiny --wandb.enabled maybe --dry-run", "--wandb.enabled is a switch: True or False, got 'maybe'"),
        ("tiny --dry-run --eval.tau-bins 0", "eval tau_bins must be positive, got 0"),
        ("tiny --dry-run --world-size 0", "--world-size must be 1 or more"),
        ("tiny --world-size 8 --out x", "--world-size 8 but 1 process was started"),
        ("tiny", "--out runs/tiny"),
        ("vit_l --out x", "--data.manifest"),
        ("tiny --out x --data.manifest nowhere.parquet", "nowhere.parquet: no such file"),
        ("tiny --out x --data.manifest moving_digits", "moving_digits: no such file or folder; did you mean"),
        (f"tiny --out {__file__}", "test_cli.py is a file; name a folder"),
        (f"tiny --out {__file__}/run", "test_cli.py/run: Not a directory; name another folder"),
        (f"tiny --out {'x' * 300}", "xxx...: File name too long; name another folder"),
    ],
)
def test_mistakes_name_the_value_and_the_way_out(line: str, said: str):
    with pytest.raises(ConfigError) as error:
        parse(line)
    assert said in str(error.value)
    assert "╭" not in str(error.value) and "\n" not in str(error.value)


def test_help_names_recipes_and_settings():
    with pytest.raises(cli.Help) as shown:
        parse("vit_g --help")
    text = str(shown.value)
    assert all(name in text for name in recipes.names())
    assert "--train.global-batch" in text and "--stages.3.frames" in text and "--out" in text
    assert "1408" in text  # the recipe's own defaults


def test_demo_manifest_is_found_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        cli.nextvid_mcore, "__file__", str(tmp_path / "package" / "nextvid_mcore" / "__init__.py")
    )
    with pytest.raises(ConfigError, match="bash examples/quickstart.sh"):
        parse("tiny --out runs/a")
    (tmp_path / cli.DEMO_MANIFEST).mkdir(parents=True)
    assert parse("tiny --out runs/a")[0].data.manifest == str(tmp_path / cli.DEMO_MANIFEST)
    assert parse("tiny --out runs/a")[0].data.eval_manifest is None


def test_a_mistake_is_said_by_one_rank_without_torch(tmp_path):
    """As a program: exit code 2, one line on rank 0, none on the others, and no torch imported."""
    code = (
        "import sys, time; time.sleep = lambda s: None\n"
        "from nextvid_mcore import cli\n"
        "try: cli.parse(['tiny', '--train.stepz', '1'])\n"
        "except cli.ConfigError as e: assert 'torch' not in sys.modules; cli.fail(e)\n"
    )
    for rank, lines in (("0", 1), ("1", 0)):
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == cli.EXIT_CONFIG
        assert len(done.stderr.splitlines()) == lines, done.stderr
        assert done.stdout == ""


def test_torchruns_last_words_are_the_message(tmp_path, monkeypatch, capsys):
    """torchrun reads this file and ends its own report with it."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        cli.fail("22 heads can't be split", 2)
    assert ended.value.code == 2 and "22 heads" in capsys.readouterr().err
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(report))
    assert failure.message == "22 heads can't be split"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EBADF])
def test_a_full_disk_under_the_metrics_is_a_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint's is saving.py's; a line of metrics.jsonl or the picture at the end can meet it too."""

    def full(config: object, out: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("nextvid_mcore.training.loop.Trainer", full)
    config, options = recipes.get("tiny"), cli.Options(tmp_path, False, 1)
    if number != errno.ENOSPC:  # a fault of ours: its traceback is wanted
        with pytest.raises(OSError):
            pretrain.train(config, options)
        return
    with pytest.raises(SystemExit) as ended:
        pretrain.train(config, options)
    assert ended.value.code == pretrain.EXIT_CHECKPOINT
    assert f"{tmp_path}: No space left on device; make room, and the same" in capsys.readouterr().err
