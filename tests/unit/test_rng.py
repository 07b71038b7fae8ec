"""rng.py: keys are stable, well mixed and independent of anything but their parts."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nextvid_mcore import rng
from nextvid_mcore.config import ConfigError

GOLDEN = {
    "item": 1445694884619442965,
    "mask": 4741698191691060268,
    "tau": 5953195795153621332,
    "philox": 504894161517,
}


def test_golden_keys_never_change():
    """A changed key changes every mask, crop and noise of a resumed run."""
    assert rng.key(0, "item", 0) == GOLDEN["item"]
    assert rng.key(7, "mask", 377_856_000, 1, 0) == GOLDEN["mask"]
    assert rng.key(0, "tau") == GOLDEN["tau"]
    assert rng.numpy_rng(3, "noise", 5).integers(0, 1 << 40) == GOLDEN["philox"]


def test_stream_numbers_are_distinct_and_kept():
    assert len(set(rng.STREAMS.values())) == len(rng.STREAMS)
    assert [rng.STREAMS[name] for name in ("item", "crop", "mask", "tau", "noise", "init", "eval")] == [
        0, 2, 4, 5, 6, 8, 10,
    ]  # fmt: skip


def test_key_is_the_same_in_another_process():
    """hash() would differ: Python salts it."""
    code = "from nextvid_mcore import rng; print(rng.key(1, 'crop', 2, 3))"
    root = Path(rng.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) == rng.key(1, "crop", 2, 3)


def test_every_part_matters_and_keys_do_not_collide():
    parts = [(s, name, i, j) for s in range(3) for name in rng.STREAMS for i in range(40) for j in range(3)]
    keys = [rng.key(s, name, i, j) for s, name, i, j in parts] + [rng.key(0, "item", i) for i in range(40)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_neighbouring_keys_are_well_mixed():
    """Half of the 63 bits flip between neighbours, and each bit is set half of the time."""
    keys = np.array([rng.key(0, "noise", i) for i in range(4000)], dtype=np.uint64)
    bits = (keys[:, None] >> np.arange(63, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.05
    assert abs((bits[1:] != bits[:-1]).mean() - 0.5) < 0.01


def test_numpy_integers_are_the_same_ids():
    assert rng.key(0, "item", np.int64(5)) == rng.key(0, "item", 5)


@pytest.mark.parametrize("call", [(0, "nosuch", 1), (0, "item", 1.5), (0, "item", 2**64), ("0", "item")])
def test_bad_keys_are_refused(call):
    with pytest.raises(ConfigError):
        rng.key(*call)


def test_generators_repeat_and_differ():
    a, b = (rng.numpy_rng(1, "tau", 4).random(1000) for _ in range(2))
    c = rng.numpy_rng(1, "tau", 5).random(1000)
    assert np.array_equal(a, b)
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.1
    x, y = (torch.randn(8, generator=rng.torch_generator(1, "init", 4)) for _ in range(2))
    z = torch.randn(8, generator=rng.torch_generator(1, "init", 5))
    assert torch.equal(x, y) and not torch.equal(x, z)


def test_one_generator_after_the_other_draws_what_each_would_alone():
    """Whatever was left over of the one before: half of 64 bits, a part of a block of four."""
    ids = [(4, 0), (5, 1), (2**62, 7), (4, 0)]

    def draws(generator: np.random.Generator) -> list:
        halves = generator.integers(0, 1 << 23, 3)
        return [*halves, generator.integers(0, 1 << 40), *generator.random(6), *generator.standard_normal(5)]

    found = [draws(generator) for generator in rng.numpy_rngs(3, "mask", ids)]
    assert found == [draws(rng.numpy_rng(3, "mask", *each)) for each in ids]
    assert found[0] == found[3] != found[1]
