"""The whole program on a GPU, on real files: a run that ends and goes on is the unbroken one.

Compiled, recorded, with a stage's change (other micro-batches, another graph) before the break. A resumed run
takes its first passes eagerly where the unbroken one replays: the same kernels, whose sums by atomics keep no
order, so 1e-3. FP8 `delayed` finds its scales anew at the start: 3%.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from launch import shared
from megatron.core.extensions import transformer_engine as te
from PIL import Image
from test_pretrain import pretrain, rows
from unit import media

from nextvid_mcore.data.manifest import Item

GRAPHS = "on" if torch.cuda.is_available() else "auto"
LINE = (
    f"tiny --model.backend auto --train.precision bf16 --train.cuda-graphs {GRAPHS} --train.init-noise 0.02 "
    "--train.micro-batch None --stages.0.micro-batch 8 --stages.1.micro-batch 4 --stages.2.micro-batch 4 "
    "--stages.3.micro-batch 4 --stages.0.steps 3 "
    "--stages.1.steps 6 --model.encoder.width 128 --model.encoder.depth 2 --model.predictor.width 64 "
    "--model.predictor.heads 2 --model.decoder.width 64 --model.decoder.heads 2 --data.workers 0 "
    "--eval.every 0 --checkpoint.every 100"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen pictures of coarse noise."""
    root = tmp_path_factory.mktemp("data")
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 72)).save(root / f"{seed}.png")
    return media.manifest(root / "train", pictures=[Item(str(p), "image") for p in root.glob("*.png")])


def starts(argvs: list[list[str]]) -> list[int]:
    """The program, several times in this process; what a process keeps of FP8 is forgotten in between."""
    codes = []
    for argv in argvs:
        if te.HAVE_TE:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
        codes += pretrain([argv])
    return codes


@pytest.mark.parametrize(("fp8", "tolerance"), [("none", 1e-3), ("delayed", 3e-2)])
def test_a_resumed_run_is_the_unbroken_one(data: Path, tmp_path: Path, fp8: str, tolerance: float) -> None:
    if fp8 != "none" and not te.HAVE_TE:
        pytest.skip("FP8 needs Transformer Engine")

    def start(name: str, steps: int) -> list[str]:
        line = f"{LINE} --fp8.all {fp8} --data.manifest {data} --out {tmp_path / name} --train.steps {steps}"
        return line.split()

    argvs = [start("whole", 9), start("broken", 5), start("broken", 9)]
    assert shared(1).run(starts, argvs, timeout=400) == [[0, 0, 0]]
    whole, broken = (rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken"))
    assert [row["step"] for row in whole] == [row["step"] for row in broken] == list(range(1, 10))
    assert [row["samples"] for row in whole] == [row["samples"] for row in broken]
    for mine, theirs in zip(broken[5:], whole[5:], strict=True):
        print(f"\n{fp8} {mine['step']} {mine['loss']:.6f} {theirs['loss']:.6f}", end="")
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)
    fell = whole[4]["loss"] - whole[8]["loss"]
    assert abs(fell) > 2 * tolerance * whole[8]["loss"] or fp8 != "none", "too little is learnt to tell"
