"""Every launch script in examples/ is run with recorders in place of torchrun and slurm, and the command
that it would have started goes through `--dry-run --world-size` with its own number of processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nextvid_mcore import cli, pretrain, recipes
from nextvid_mcore.parallel.placement import settled
from nextvid_mcore.parallel.plan import check

ROOT = Path(__file__).resolve().parents[2]
NODE = sorted((ROOT / "examples").glob("pretrain_*.sh"))
SLURM = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
FAKES = {
    "torchrun": RECORDER,
    "srun": '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames nodes-list" ] && echo first && echo second\n',
}


@dataclass(frozen=True)
class Launch:
    """What a script would have started."""

    torchrun: dict[str, str]  # torchrun's own flags
    arguments: list[str]  # of nextvid_mcore.pretrain

    @property
    def world_size(self) -> int:
        return int(self.torchrun.get("--nnodes", "1")) * int(self.torchrun["--nproc-per-node"])


def launch(script: Path, tmp: Path, *arguments: str, **variables: str) -> Launch:
    """Run `script` with `arguments` and environment `variables`, and read its one call of torchrun."""
    for name, text in FAKES.items():
        (tmp / name).write_text(text)
        (tmp / name).chmod(0o755)
    record = tmp / "record"
    record.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    env |= {"PATH": f"{tmp}:{os.environ['PATH']}", "RECORD": str(record)}
    if script.suffix == ".sbatch":
        nodes = re.search(r"^#SBATCH --nodes=(\d+)$", script.read_text(), re.MULTILINE)
        assert nodes is not None
        env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "nodes-list", "SLURM_JOB_ID": "7"}
        env |= {"SLURM_NNODES": nodes[1]}
    subprocess.run(["bash", str(script), *arguments], env=env | variables, check=True, cwd=tmp, timeout=60)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(calls) == 1, calls
    return parse(calls[0])


def parse(call: list[str]) -> Launch:
    """torchrun's flags up to `-m nextvid_mcore.pretrain`, and what follows."""
    module = call.index("-m")
    assert call[module + 1] == "nextvid_mcore.pretrain"
    own, flags = call[:module], {}
    while own:
        name = own.pop(0)
        assert name.startswith("--"), name
        flags[name] = own.pop(0) if own and not own[0].startswith("--") else ""
    return Launch(flags, call[module + 2 :])


def recipe_of(script: Path) -> str:
    found = re.match(r"pretrain_(vit_[lhg])", script.name)
    assert found is not None, script
    return found[1]


def test_the_scripts_are_there() -> None:
    assert [recipe_of(script) for script in NODE] == ["vit_g", "vit_h", "vit_l"]
    assert [recipe_of(script) for script in SLURM] == ["vit_g", "vit_h", "vit_l"]
    for script in [*NODE, ROOT / "examples" / "quickstart.sh", ROOT / "scripts" / "install.sh"]:
        assert os.access(script, os.X_OK), f"{script} is not executable"


@pytest.mark.parametrize("script", [*NODE, *SLURM], ids=lambda s: s.name)
def test_the_command_passes_a_dry_run(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = launch(script, tmp_path)
    assert started.arguments[0] == recipe_of(script)
    assert started.world_size == (96 if script.suffix == ".sbatch" else 8)
    monkeypatch.chdir(tmp_path)  # the plan needs no data, so it must not need the clone's folders either
    code = pretrain.main([*started.arguments, "--dry-run", "--world-size", str(started.world_size)])
    plan = capsys.readouterr().out
    millions = {"vit_l": "303.9M", "vit_h": "631.6M", "vit_g": "1,012.2M"}[recipe_of(script)]
    assert "  backend: auto, which is " in plan  # Transformer Engine where it can run
    assert code == 0 and millions in plan and f"{started.world_size} ranks" in plan, plan


@pytest.mark.parametrize("script", [*NODE, *SLURM], ids=lambda s: s.name)
def test_the_variables_and_further_settings_reach_the_run(script: Path, tmp_path: Path) -> None:
    variables = {"DATA": "/d/a b", "VALIDATION": "/d/v", "VA_VAE": "/w/vae.pt", "STATISTICS": "/w/s.pt"}
    variables |= {"OUT": "/r/out", "GPUS": "4", "MICRO_BATCH": "2"}
    if script.suffix == ".sbatch":
        variables |= {"SLURM_NNODES": "3"}
    started = launch(script, tmp_path, "--train.steps", "7", **variables)
    config, options = cli.parse([*started.arguments, "--dry-run", "--world-size", str(started.world_size)])
    assert str(options.out) == "/r/out" and options.world_size == (12 if script.suffix == ".sbatch" else 4)
    assert (config.data.manifest, config.data.eval_manifest) == ("/d/a b", "/d/v")
    assert (config.target.checkpoint, config.target.statistics) == ("/w/vae.pt", "/w/s.pt")
    assert (config.train.micro_batch, config.train.steps) == (2, 7)


@pytest.mark.parametrize("script", [*NODE, *SLURM], ids=lambda s: s.name)
def test_without_va_vae_they_train_on_pixels(script: Path, tmp_path: Path) -> None:
    started = launch(script, tmp_path, VA_VAE="")
    config, _ = cli.parse([*started.arguments, "--dry-run", "--world-size", str(started.world_size)])
    assert (config.target.kind, config.target.checkpoint) == ("pixels", None)


@pytest.mark.parametrize("script", [*NODE, *SLURM], ids=lambda s: s.name)
def test_micro_batches_are_the_recipes_and_fp8_is_a_word(script: Path, tmp_path: Path) -> None:
    """Without a setting a GPU gets micro-batches that fill it, each stage its own."""
    plain = launch(script, tmp_path)
    config, _ = cli.parse([*plain.arguments, "--dry-run"])
    config = settled(config, plain.world_size)[0]
    most = [stage.max_micro_batch for stage in recipes.get(recipe_of(script)).stages]
    assert [config.micro_batch(stage) for stage in config.stages] == most
    assert most[2] >= 16 and config.fp8.used == {}
    low = launch(script, tmp_path, FP8="delayed")
    config, _ = cli.parse([*low.arguments, "--dry-run"])
    assert set(config.fp8.recipes().values()) == {"delayed"}
    assert check(config, low.world_size, dry_run=True).world == low.world_size


@pytest.mark.parametrize("script", [*NODE, *SLURM], ids=lambda s: s.name)
def test_without_an_environment_they_say_how_to_get_one(script: Path, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT)}
    ended = subprocess.run([shutil.which("bash"), script], env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert "no torchrun; in the clone: bash scripts/install.sh train && . .venv/bin/activate" in ended.stderr


def test_scripts_that_are_started_otherwise_say_how(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    for script, words in (
        (SLURM[0], "start it with sbatch"),
        (ROOT / "examples" / "quickstart.sh", "no arg"),
    ):
        command = ["bash", str(script), "--help"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode != 0 and words in done.stdout + done.stderr


@pytest.mark.parametrize("script", SLURM, ids=lambda s: s.name)
def test_slurm_nodes_meet_on_the_first(script: Path, tmp_path: Path) -> None:
    flags = launch(script, tmp_path).torchrun
    assert flags["--rdzv-endpoint"] == "first:29500" and flags["--rdzv-id"] == "7"
    assert flags["--rdzv-backend"] == "c10d"
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    assert header["ntasks-per-node"] == "1" and header["gpus-per-node"] == flags["--nproc-per-node"]


def test_an_impossible_layout_ends_the_dry_run(tmp_path: Path) -> None:
    """As a person meets it, and so that the dry runs above are known to be able to fail."""
    script = ROOT / "examples" / "pretrain_vit_g_8gpu.sh"
    started = launch(script, tmp_path, "--parallel.encoder.tensor", "4")
    command = [sys.executable, "-m", "nextvid_mcore.pretrain", *started.arguments]
    plan = subprocess.run(
        [*command, "--dry-run", "--world-size", str(started.world_size)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert plan.returncode == 2 and "22 heads" in plan.stderr and "Traceback" not in plan.stderr
    assert plan.stdout == ""
