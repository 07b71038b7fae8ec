"""What is taken from NVIDIA apex where it is installed: shown with a package that has its names and calls.

Its kernels need CUDA and are not under test; that the right functions get the right arguments is. The
cases are processes of their own: megatron-core looks for apex when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = {
    "__init__.py": "",
    "normalization/__init__.py": "",
    "normalization/fused_layer_norm.py": """
import torch
class FusedLayerNormAffineFunction(torch.autograd.Function):
    calls = 0
    @staticmethod
    def forward(ctx, input, weight, bias, normalized_shape, eps, memory_efficient=False):
        FusedLayerNormAffineFunction.calls += 1
        args = [x.detach().requires_grad_() for x in (input, weight, bias)]
        with torch.enable_grad():
            out = torch.nn.functional.layer_norm(args[0], normalized_shape, *args[1:], eps)
        ctx.args, ctx.out = args, out
        return out.detach()
    @staticmethod
    def backward(ctx, grad):
        return *torch.autograd.grad(ctx.out, ctx.args, grad), None, None, None
""",
    "optimizers.py": """
import torch
class FusedSGD(torch.optim.SGD): pass
class FusedAdam(torch.optim.AdamW):
    # apex counts steps per group and knows whether it decays as AdamW does
    def __init__(self, params, adam_w_mode=True, **settings):
        assert adam_w_mode
        super().__init__(params, **settings)
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["step"] = torch.tensor(float(group["step"]))
        super().step()
        for group in self.param_groups:
            group["step"] += 1
""",
}
NORM = """
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nextvid_mcore.models.norm import ApexLayerNorm, LocalLayerNorm, local_norm
assert local_norm() is LocalLayerNorm  # its kernels need CUDA
torch.cuda.is_available = lambda: True
chosen = local_norm()
print(chosen.__name__)
if chosen is ApexLayerNorm:
    from apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction as function
    for dtype in (torch.float32, torch.bfloat16):
        config = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=2, params_dtype=dtype,
            sequence_parallel=True, tensor_model_parallel_size=2, use_cpu_initialization=True,
            layernorm_epsilon=1e-3, persist_layer_norm=False, bf16=dtype == torch.bfloat16)
        norms = [kind(config=config, hidden_size=24, eps=1e-3) for kind in (ApexLayerNorm, LocalLayerNorm)]
        x = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = function.calls
        outs = [norm(x) for norm in norms]
        assert function.calls == before + 1
        for norm, out in zip(norms, outs):
            out.float().square().sum().backward()
            assert out.dtype == norm.weight.dtype == dtype
            assert norm.weight.sequence_parallel and norm.bias.sequence_parallel
        assert torch.equal(*outs) and torch.equal(*(norm.weight.grad for norm in norms))
        assert list(norms[0].state_dict()) == list(norms[1].state_dict())
"""
ADAM = """
import sys
sys.path.insert(0, "benchmarks")
import dataclasses
from common import Bench
from megatron.core.optimizer.distrib_optimizer import Adam
from nextvid_mcore import recipes
from nextvid_mcore.config import TargetConfig
from nextvid_mcore.parallel.groups import init_distributed
init_distributed()
config = recipes.get("tiny")
stage = dataclasses.replace(config.stages[0], batch=2, lr_start=1e-3)
bench = Bench(dataclasses.replace(config, stages=(stage,), target=TargetConfig("pixels"),
    train=dataclasses.replace(config.train, micro_batch=2, init_noise=0.02)))
inner = next(iter(bench.step.optimizers.optimizers.values())).optimizer
assert type(inner) is Adam or Adam.__module__.startswith("torch")
print(type(inner).__module__, *[bench.take().loss for _ in range(3)])
"""


@pytest.fixture(scope="module")
def apex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name, text in FAKE.items():
        (folder / "apex" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "apex" / name).write_text(text)
    return folder


def python(code: str, *path: Path) -> list[list[str]]:
    """The words of the lines that `code` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_its_adam_and_its_layer_norm_are_taken(apex: Path, tmp_path: Path):
    """Also that the other project called apex is not taken for it."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (adam, *losses), (norm,) = python(ADAM + NORM, apex)
    (torchs, *expected), (plain,) = python(ADAM + NORM, tmp_path)
    assert (adam, norm, plain) == ("apex.optimizers", "ApexLayerNorm", "LocalLayerNorm")
    assert torchs.startswith("torch.optim")
    assert losses == expected and len({*losses}) == 3  # it trains, as torch's AdamW does
