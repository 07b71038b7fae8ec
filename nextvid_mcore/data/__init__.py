"""Clips from a manifest: which sample is which item, decoding, cropping, batching. See loader.py.

Names are looked up when asked for: the tools and their processes need no torch.
"""

from importlib import import_module

_HOME = {
    "BadFileLog": "guard",
    "BadShareGuard": "guard",
    "DataError": "guard",
    "ClipBatch": "loader",
    "ClipDataset": "loader",
    "build_dataset": "loader",
    "build_loader": "loader",
    "iterate": "loader",
    "Manifest": "manifest",
    "Request": "sampler",
    "rank_batches": "sampler",
    "normalize": "transforms",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
