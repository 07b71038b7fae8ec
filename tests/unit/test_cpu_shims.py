"""Each shim of parallel/cpu.py: megatron-core fails without it (or would ask for CUDA), works with it."""

import pytest
import torch
import torch.distributed as dist

from nextvid_mcore.parallel import cpu, groups

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shims stand in for CUDA")


@pytest.fixture(autouse=True, scope="module")
def world():
    groups.init_distributed()


def test_device_queries():
    from megatron.core.utils import GlobalMemoryBuffer

    buffer = GlobalMemoryBuffer().get_tensor((3,), torch.float32, "test")  # asks for the current device
    assert buffer.device.type == "cpu"
    torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())


@pytest.mark.parametrize("name", cpu._LITERAL_CUDA)
def test_literal_devices(name):
    import importlib

    module = importlib.import_module(name)
    assert module.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert module.torch.nn is torch.nn
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros([], device="cuda")  # the shim reaches no further than those modules


def test_literal_devices_in_the_gradient_norm():
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    assert get_grad_norm_fp32([torch.tensor([3.0]), torch.tensor([4.0])]) == pytest.approx(5.0)


def test_type_names():
    from megatron.core.optimizer import clip_grads

    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    clip_grads.clip_grad_by_total_norm_fp32([param], max_norm=1.0, total_norm=5.0)  # asserts CUDA's name
    assert param.grad.norm() == pytest.approx(1.0, rel=1e-4)
    assert param.type() == "torch.FloatTensor"
    with cpu.CudaTypeNames():
        assert param.bfloat16().type() == "torch.cuda.BFloat16Tensor"


def test_random_states():
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    one = groups.build_groups(groups.Layout())
    groups.seed_trackers(5, one)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    groups.seed_trackers(5, one)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(first, torch.rand(3))
    assert not torch.equal(first, second)

    x = torch.ones(64, requires_grad=True)  # recompute must draw the same dropout twice
    out = tensor_parallel.checkpoint(lambda v: torch.nn.functional.dropout(v, 0.5) * v, False, x)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out.detach() == 0)


def test_bridge_backend():
    from megatron.core.pipeline_parallel import bridge_communicator

    group = bridge_communicator.dist.new_group([0], backend="nccl")
    assert dist.get_backend(group) == "gloo"


def test_install_is_repeatable():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    before = DistributedOptimizer.__init__
    cpu.install()
    assert DistributedOptimizer.__init__ is before
