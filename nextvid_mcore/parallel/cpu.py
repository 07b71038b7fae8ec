"""What megatron-core 0.19 needs on a machine without CUDA, in one place.

megatron-core asks CUDA for the current device and stream, writes `device="cuda"` literally, compares
`tensor.type()` with CUDA's names and keeps its random states on the GPU. `install()` gives each of these
a CPU answer, and does nothing where CUDA is available. Every shim is one function in `SHIMS`, with one
test in tests/unit/test_cpu_shims.py: a shim that megatron-core no longer needs can be seen and dropped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = ("empty", "full", "ones", "tensor", "zeros")
_LITERAL_CUDA = (  # modules that write device="cuda"
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
)
_installed = False


class CpuStream:
    """Stands in for a CUDA stream: on a CPU everything is already in order."""

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _TorchOnCpu(types.ModuleType):
    """The `torch` module, except that a factory told `device="cuda"` makes a CPU tensor."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in _FACTORIES:
            return value

        @functools.wraps(value)
        def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return value(*args, **kwargs)

        return factory


class _DistWithoutNccl(types.ModuleType):
    """`torch.distributed`, except that a group asked for with backend nccl gets the default backend."""

    def __init__(self) -> None:
        super().__init__("torch.distributed")

    def __getattr__(self, name: str) -> Any:
        value = getattr(dist, name)
        if name not in ("new_group", "new_subgroups_by_enumeration"):
            return value

        @functools.wraps(value)
        def new_group(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("backend") == "nccl":
                kwargs["backend"] = None
            return value(*args, **kwargs)

        return new_group


class CudaTypeNames(torch.overrides.TorchFunctionMode):
    """Inside it `tensor.type()` names a CPU tensor as CUDA would ("torch.cuda.FloatTensor")."""

    def __torch_function__(
        self, func: Callable, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(out, str) and "cuda" not in out:
            out = out.replace("torch.", "torch.cuda.")
        return out


def _with_cuda_type_names(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with CudaTypeNames():
            return function(*args, **kwargs)

    return wrapped


def device_queries() -> None:
    """`torch.cuda.current_device`, `synchronize` and `current_stream` are called without a guard."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: CpuStream()


def literal_devices() -> None:
    """The pipeline schedules and the optimizer make small tensors with `device="cuda"`."""
    for name in _LITERAL_CUDA:
        importlib.import_module(name).torch = _TorchOnCpu()


def type_names() -> None:
    """DistributedOptimizer and gradient clipping check `tensor.type()` against CUDA's names."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    cls = distrib_optimizer.DistributedOptimizer
    cls.__init__ = _with_cuda_type_names(cls.__init__)
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip


def random_states() -> None:
    """The RNG tracker (weight initialisation, recompute, dropout) forks the CPU's generator instead."""
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        """megatron-core's tracker on the CPU generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name} with seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"random state {name} was not added: seed the trackers first")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def bridge_backend() -> None:
    """The communicator between modules of different layouts asks for NCCL groups."""
    from megatron.core.pipeline_parallel import bridge_communicator

    bridge_communicator.dist = _DistWithoutNccl()


SHIMS: tuple[Callable[[], None], ...] = (
    device_queries,
    literal_devices,
    type_names,
    random_states,
    bridge_backend,
)


def install() -> None:
    """Apply every shim once. Does nothing where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    for shim in SHIMS:
        shim()
    _installed = True
