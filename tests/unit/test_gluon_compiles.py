"""The Gluon kernels compile for Hopper on any machine. What they compute, tests/gpu/test_pieces.py sees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from nextvid_mcore.models.kernels import GLUON

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Hopper:  # as far as compiling asks for it
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compiled(self, *args, warmup, **options):
    kernel = run(self, *args, warmup=True, **options)
    assert len(kernel.asm["cubin"]) and "wgmma.mma_async" in kernel.asm["ptx"]
    print(kernel.name)

driver.set_active(Hopper())
run, jit.JITFunction.run = jit.JITFunction.run, compiled

from nextvid_mcore.models import gluon_prefix, gluon_stairs

x = torch.empty(512, 2, 3, 3, 64, dtype=torch.bfloat16).permute(3, 1, 2, 0, 4)  # of [s, rows, A, q k v, d]
gluon_prefix.attend(*x, 256)
gluon_prefix.attend_low(*x, 256, torch.empty(1), torch.empty(1), torch.float8_e4m3fn)
x = [part.requires_grad_() for part in x]
out = gluon_stairs.attend(*x, ((0, 0, 4, 48, 48), (192, 192, 10, 32, 32)))
torch.autograd.grad(out, x, torch.empty_like(out))
"""


@pytest.mark.skipif(not triton.__version__.startswith(GLUON), reason=f"written in Triton {GLUON}x's Gluon")
def test_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["_prefix", "_prefix", "_forward", "query_gradient", "key_gradients"]
