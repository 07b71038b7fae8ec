"""The online kNN in every kind of layout: the same features, those of the exported encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from launch import shared
from PIL import Image
from test_convert import convert
from unit import media

from nextvid_mcore.data.manifest import Item
from nextvid_mcore.training.metrics import read

SMALL = (
    "tiny --train.init-noise 0.02 --train.micro-batch 1 --data.workers 0 --model.image-size 32 "
    "--mask.keep 0.5 0.25 --model.encoder.depth 2 --model.decoder.depth 1 --model.predictor.depth 1 "
    "--stages.0.frames 4 --train.global-batch 2 --train.steps 2 --eval.every 2 --eval.samples 2 "
    "--eval.batch 2 --eval.knn-every 1 --eval.knn-samples 12 --optim.ema 0.5"
)
LAYOUTS = {  # name -> ranks, settings
    "dp2": (2, ""),
    "tp2-sp": (
        2,
        "--parallel.encoder.tensor 2 --parallel.sequence --parallel.generator.tensor 1 --train.micro-batch 2",
    ),
    "two-reference": (2, "--parallel.placement two-groups --parallel.reference generator"),
    "three-pp2": (4, "--parallel.placement three-groups --parallel.encoder.pipeline 2"),
    "no-align": (2, "--parallel.placement two-groups --no-model.align"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of noise with labels."""
    root = tmp_path_factory.mktemp("data")
    items = []
    for i in range(12):
        path = root / f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(path)
        items.append(Item(str(path), "image", label=i % 2))
    return media.manifest(root / "labelled", pictures=items)


def train(data: Path, folder: Path, runs: dict[str, str]) -> dict[str, list[tuple]]:
    """What `OnlineKnn.features` gave, by run and call."""
    from test_pretrain import pretrain

    from nextvid_mcore.training.online_knn import OnlineKnn

    found: dict[str, list[tuple]] = {}
    plain = OnlineKnn.features

    def features(self: OnlineKnn, training: str) -> tuple:
        out = plain(self, training)
        found[name].append(out)
        return out

    OnlineKnn.features = features
    try:
        for name, extra in runs.items():
            found[name] = []
            words = (
                f"{SMALL} --data.manifest {data} --data.eval-manifest {data} --out {folder / name} {extra}"
            )
            assert pretrain([words.split()]) == [0]
    finally:
        OnlineKnn.features = plain
    return found


def test_every_layout_sees_the_features_of_the_exported_encoder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextvid_mcore.hub import load_encoder

    alone = shared(1).run(train, data, tmp_path, {"one": "", "one-no-align": "--no-model.align"}, timeout=300)
    numbers, expected = zip(*alone[0]["one"], strict=True)
    assert torch.equal(numbers[0], torch.arange(12)) and len(expected) == 2
    assert (expected[1] - expected[0]).abs().max() > 1e-4  # it moves, so old weights would be seen

    checkpoint = tmp_path / "one" / "checkpoints" / "step_00000002"
    assert convert(checkpoint, "--out", tmp_path / "export", monkeypatch=monkeypatch) == 0
    from nextvid_mcore import cli
    from nextvid_mcore.data.labelled import build_labelled

    words = f"{SMALL} --data.manifest {data} --data.eval-manifest {data} --out x"
    batch = build_labelled(cli.parse(words.split())[0])[4, range(12)]
    with torch.no_grad():
        exported = load_encoder(tmp_path / "export")(batch.video.float() / 127.5 - 1)
    torch.testing.assert_close(expected[1], exported.mean(1), rtol=0, atol=2e-5)

    for ranks in (2, 4):
        runs = {name: extra for name, (count, extra) in LAYOUTS.items() if count == ranks}
        for found in shared(ranks).run(train, data, tmp_path, runs, timeout=600):
            for name in runs:
                want = alone[0]["one-no-align" if name == "no-align" else "one"]
                for (a, x), (b, y) in zip(found[name], want, strict=True):
                    assert torch.equal(a, b)
                    torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_its_line_in_eval_jsonl(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared(1).run(train, data, tmp_path, {"one": ""}, timeout=300)
    first, second = read(tmp_path / "one" / "eval.jsonl")
    assert first["knn_clips"] == 12 and 0 <= first["knn_pictures"] <= 100 and "ema" not in first
    assert second["ema"]["loss"] > 0 and second["knn_share"] > 0


def without_memory(data: Path, out: Path) -> tuple[tuple[int, str], int]:
    """How a run ends whose GPU is full in the first kNN, and the same run again."""
    from unittest import mock

    from test_pretrain import pretrain, told

    words = f"{SMALL} --data.manifest {data} --data.eval-manifest {data} --out {out}".split()
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    with mock.patch("nextvid_mcore.training.online_knn.share", side_effect=full):
        ends = told(words)
    return ends, *pretrain([words])


def test_full_memory_names_the_setting_and_saves(data: Path, tmp_path: Path) -> None:
    (code, said), again = shared(1).run(without_memory, data, tmp_path / "run", timeout=300)[0]
    assert (code, again) == (2, 0) and [row["step"] for row in read(tmp_path / "run" / "eval.jsonl")] == [2]
    assert said == (
        "step 1, online kNN: the GPU's memory is full with 2 clips a pass; lower --eval.batch, or "
        "--train.micro-batch (2.00 GiB more asked for); saved after step 1, from where the run goes on"
    )
