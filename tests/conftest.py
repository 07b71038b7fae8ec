"""Settings for every test: one thread, and the folders with shared test code on the path."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; spawned processes inherit it

import torch  # noqa: E402

if not torch.cuda.is_available():  # Triton's kernels are then interpreted; it looks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "distributed"):
    sys.path.insert(0, str(folder))
