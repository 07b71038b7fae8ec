"""Clips from a manifest: which sample is which item, decoding, cropping, batching. See loader.py."""

from nextvid_mcore.data.guard import BadFileLog, BadShareGuard, DataError
from nextvid_mcore.data.loader import ClipBatch, ClipDataset, build_dataset, build_loader, iterate
from nextvid_mcore.data.manifest import Manifest
from nextvid_mcore.data.sampler import Request, rank_batches
from nextvid_mcore.data.transforms import normalize

__all__ = [
    "BadFileLog",
    "BadShareGuard",
    "ClipBatch",
    "ClipDataset",
    "DataError",
    "Manifest",
    "Request",
    "build_dataset",
    "build_loader",
    "iterate",
    "normalize",
    "rank_batches",
]
