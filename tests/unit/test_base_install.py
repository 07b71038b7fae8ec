"""The base install alone (torch, safetensors) loads an exported encoder.

A fresh virtual environment gets what pip would put there for the base: this package, built and installed
by pip from a copy of the source, and the closure of its declared dependencies and nothing else. Those
packages are links to the ones that are installed already, because fetching torch again costs gigabytes
and a minute. `pip check` in the new environment then says whether every declared requirement is met.
"""

import json
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nextvid_mcore import hub, recipes
from nextvid_mcore.hub import export

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib.util, json, sys
import torch
from nextvid_mcore.hub import load_encoder
for name in ("megatron", "tyro", "decord", "pyarrow", "matplotlib", "wandb", "pytest"):
    assert importlib.util.find_spec(name) is None, f"{name} is in the base install"
encoder = load_encoder(sys.argv[1])
video = torch.linspace(-1, 1, 3 * 8 * 64 * 64).reshape(1, 3, 8, 64, 64)
with torch.no_grad():
    features = encoder(video)
import nextvid_mcore
print(json.dumps([nextvid_mcore.__file__, list(features.shape), features.double().abs().sum().item()]))
"""


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """Installed distributions that `requirements` bring, by canonical name, extras and markers included."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = distribution(requirement.name)
        for text in found[name].requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras | {""}):
                todo.append(needed)
    return found


def link(dist: Distribution, site: Path) -> None:
    """Link the top-level entries of an installed distribution into `site`."""
    for top in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(dist.locate_file(top))))


@pytest.fixture(scope="module")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that holds the base install."""
    tmp = tmp_path_factory.mktemp("base")
    source = tmp / "source"
    shutil.copytree(
        ROOT / "nextvid_mcore", source / "nextvid_mcore", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    venv.create(tmp / "venv", symlinks=True)
    python = tmp / "venv" / "bin" / "python"
    site = tmp / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for dist in closure(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ).values():
        link(dist, site)
    pip(python, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(source))
    return python


def pip(python: Path, *arguments: str) -> str:
    """This environment's pip at work on the environment of `python`."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--no-input", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_requirements_are_met_by_the_base_alone(base_python: Path) -> None:
    assert "No broken requirements" in pip(base_python, "check")
    names = {canonicalize_name(d["name"]) for d in json.loads(pip(base_python, "list", "--format", "json"))}
    assert {"nextvid-mcore", "torch", "safetensors"} <= names
    assert not names & {"megatron-core", "einops", "decord", "tyro", "pyarrow", "wandb", "pytest"}


def test_an_encoder_loads_and_gives_the_same_features(base_python: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = export.flat_config(recipes.get("tiny"), channels=384, step=1, weights="ema")
    encoder = hub.VisionTransformer.from_config(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export.write_folder(tmp_path, config, {"encoder": encoder.state_dict()})

    # -I: neither the working directory nor PYTHONPATH may help
    command = [str(base_python), "-I", "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, shape, total = json.loads(result.stdout)
    assert str(base_python.parents[1]) in file and shape == [1, 4 * 64, 96]
    video = torch.linspace(-1, 1, 3 * 8 * 64 * 64).reshape(1, 3, 8, 64, 64)
    with torch.no_grad():
        assert total == pytest.approx(encoder.eval()(video).double().abs().sum().item(), rel=1e-4)
