"""benchmarks/vs_vjepa2.py: what it refuses, its stopwatch, and (with a checkout) V-JEPA 2's own step.

The last needs NEXTVID_VJEPA2=PATH, a clone of github.com/facebookresearch/vjepa2, and timm and PyYAML.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nextvid_mcore.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = os.environ.get("NEXTVID_VJEPA2")
SMALLER = {
    "vit_giant_xformers": "vit_tiny",
    "crop_size: 256": "crop_size: 64",
    "  - 16\n": "  - 4\n",
    "pred_depth: 12": "pred_depth: 1",
    "pred_embed_dim: 384": "pred_embed_dim: 192",
}


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import vjepa2_step

    return vjepa2_step


def compare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks/vs_vjepa2.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, step):
    with pytest.raises(ConfigError, match="app/vjepa/train.py.*git clone"):
        step.check_checkout(tmp_path)
    with pytest.raises(ConfigError, match="--config none.yaml: no such file"):
        step.read_settings(tmp_path, "none.yaml")


def test_another_package_of_that_name_is_not_measured(tmp_path: Path, step, monkeypatch):
    other = tmp_path / "other" / "app" / "vjepa"
    other.mkdir(parents=True)
    (other.parent / "__init__.py").touch()
    (other / "train.py").touch()
    (tmp_path / "checkout").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="another package called `app`"):
        with step.imported(tmp_path / "checkout", {}):
            pass
    assert not [name for name in sys.modules if name.split(".")[0] in ("app", "src")]


def test_the_stopwatch_counts_whole_steps(step):
    loader, seen = step.Loader(["a", "b"], steps=3, warmup=2), []
    with pytest.raises(step.Finished):
        for batch in loader:
            seen.append(batch)
            assert len(loader.times) == max(0, len(seen) - 2)
    assert seen == ["a", "b", "a", "b", "a"] and len(loader.times) == 3 + 1
    assert not isinstance(step.Finished(), Exception)  # their loop swallows those


def test_blocks_are_compiled_by_torch_as_it_comes(step, monkeypatch):
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    from nextvid_mcore.models import inductor

    class Block(torch.nn.Linear):
        def compile(self) -> None:
            compiled.append(self)

    wrappers = ModuleType("src.utils.wrappers")
    for name in ("MultiSeqWrapper", "PredictorMultiSeqWrapper"):
        setattr(wrappers, name, type(name, (torch.nn.Sequential,), {}))
    monkeypatch.setitem(sys.modules, "src.utils.wrappers", wrappers)
    network, compiled = wrappers.MultiSeqWrapper(Block(2, 2), torch.nn.Linear(2, 2), Block(2, 2)), []
    kernel, inner = torch.backends.cuda.sdp_kernel, torch.nn.Module.compile
    inductor.install()
    with step.compiler("blocks"):
        assert type(V.choices) is InductorChoices
        with torch.backends.cuda.sdp_kernel():
            network.compile()
    assert compiled == [network[0], network[2]]
    assert torch.backends.cuda.sdp_kernel is kernel and type(network).compile is inner
    assert isinstance(V.choices, inductor.Choices)
    with pytest.raises(ConfigError, match="Linear has no modules called Block"):
        step.compile_blocks(torch.nn.Linear(2, 2))


@pytest.mark.skipif(not CHECKOUT, reason="needs a clone of V-JEPA 2: NEXTVID_VJEPA2=PATH")
def test_their_step_beside_ours(tmp_path: Path):
    text = (Path(CHECKOUT) / "configs/train/vitg16/pretrain-256px-16f.yaml").read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "tiny.yaml").write_text(text)
    run = ["--checkout", CHECKOUT, "--config", str(tmp_path / "tiny.yaml"), "--batch", "2"]
    run += ["--steps", "2", "--warmup", "1", "--accumulate", "2", "tiny", "--train.micro-batch", "3"]
    refused = compare(*run, "--model.image-size", "128")
    assert refused.returncode == 2 and "64 pixels and ours 128" in refused.stderr
    done = compare(*run, "--model.image-size", "64")
    assert done.returncode == 0, done.stderr
    theirs, mine = done.stdout.splitlines()[-2:]
    assert theirs.startswith("V-JEPA 2, eager") and mine.startswith("ours, local")
    columns = [line[22:].split() for line in (theirs, mine)]
    assert [row[0] for row in columns] == ["2", "6"] and columns[0][4] == "1.00"
    rates, losses = ([float(row[i]) for row in columns] for i in (1, 5))
    assert float(columns[1][4]) == pytest.approx(rates[1] / rates[0], rel=0.02)
    assert 0.5 < losses[0] < 1  # L1 of layer-normed features from a mean of zero
    assert torch.tensor(losses).isfinite().all()
