"""What of ours can be switched off, for benchmarks and tests to compare it with what it stands in for.

Runs have all of it where it fits; what they can be told is in nextvid_mcore/config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_on = {
    "gated_norm": True,  # models/triton_adaln.py's kernels, not torch.compile's
    "monitors": True,  # `fused.cosine` and `fused.moments` in one pass each, not torch's
    "pixels": True,  # `fused.pixels` in one pass, not torch's
    # models/fp8_layer.py:
    "trained": True,  # in passes with gradients too
    "carry": True,  # additions go across layers
    "attention": True,  # its output is written in FP8
    # of optimizers that are made from now on:
    "one_pass": True,  # the update by one kernel, not megatron-core's
}


def on(name: str) -> bool:
    return _on[name]


@contextlib.contextmanager
def changed(**switches: bool) -> Iterator[None]:
    """With some of them on or off."""
    before = dict(_on)
    if unknown := switches.keys() - before.keys():
        raise KeyError(f"{', '.join(unknown)}: there are {', '.join(before)}")
    _on.update(switches)
    try:
        yield
    finally:
        _on.update(before)
