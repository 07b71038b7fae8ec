"""Randomness as a pure function of (seed, stream, ids): nothing is ever drawn from a shared state.

What a sample looks like (item, crop, masks, tau, noise) depends on the run's seed and the sample's
global index alone, so any layout, worker count, micro-batch or resume sees the same numbers. A key
is a BLAKE2b digest of the integers that name the draw; it seeds a counter-based generator.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from nextvid_mcore.config import ConfigError

if TYPE_CHECKING:  # loader workers draw with numpy alone
    import torch

# Part of every key: never renumber or reuse a number, only append.
STREAMS: dict[str, int] = {
    "item": 0,  # which data set and which of its items
    "window": 1,  # where a clip starts in its video
    "crop": 2,
    "flip": 3,
    "mask": 4,
    "tau": 5,
    "noise": 6,
    "posterior": 7,  # sampling of the target VAE
    "init": 8,  # weights
    "init_noise": 9,  # --train.init-noise
    "eval": 10,  # derives the seed of the held-out loss
    "test": 11,
    "digits": 12,  # moving digits: which digit, where it starts, where it goes
    "probe": 13,  # the probe's splits and the order of its training items
}


def key(seed: int, stream: str, *ids: int) -> int:
    """A well-mixed integer in [0, 2**63), the same on every platform and Python version."""
    if stream not in STREAMS:
        raise ConfigError(f"no random stream {stream!r}; there are {', '.join(STREAMS)}")
    try:
        message = struct.pack(f"<{2 + len(ids)}q", seed, STREAMS[stream], *ids)
    except struct.error as error:
        raise ConfigError(
            f"random key (seed {seed!r}, {stream}, ids {ids!r}) must hold whole numbers of 64 bits: {error}"
        ) from None
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, stream: str, *ids: int) -> np.random.Generator:
    """A Philox generator keyed by (seed, stream, ids)."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, *ids)))


def numpy_rngs(seed: int, stream: str, ids: Iterable[tuple[int, ...]]) -> Iterator[np.random.Generator]:
    """What `numpy_rng` gives, for one key after the other; each is good until the next is asked for.

    A Philox that is made asks the operating system for random bits, even with a key, and takes some five
    times as long as one that is given another key.
    """
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    for each in ids:
        philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": (0, 0, 0, 0), "key": (key(seed, stream, *each), 0)},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,  # used up
            "has_uint32": 0,
            "uinteger": 0,
        }
        yield generator


def torch_generator(seed: int, stream: str, *ids: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator seeded by (seed, stream, ids).

    torch's CPU generator keeps 32 bits of a seed: fine for a few draws (weights), not for one per
    sample of a long run, which belongs to `numpy_rng`. Its CUDA generator (Philox) keeps all.
    """
    import torch

    return torch.Generator(device=device).manual_seed(key(seed, stream, *ids))
