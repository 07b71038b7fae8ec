"""A convolution that adds its bias and a residual before it writes: one graph of cuDNN's.

torch has no operation for it (its fused one ends in a ReLU; a bias it adds in a pass of its own), so cuDNN's
backend interface is called directly, in the library that torch has loaded; numbers are those of its
cudnn_graph.h. What matters: the residual is added before the bias, and the bias has the precision of the
rest. So written, cuDNN has ready-made kernels, which take 0.09 ms more than a convolution of 0.84; in the
other order, or with a bias of fp32, it generates one, which takes 1.1 ms at best (H100, 32 images of
256 x 256 with 128 channels; benchmarks/RESULTS.md).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

# kinds of descriptors
POINTWISE, CONVOLUTION, CONFIGURATION, HEURISTICS, PLAN = 0, 1, 3, 4, 5
CONVOLVE, POINT, GRAPH, PACK, TENSOR = 10, 13, 15, 16, 17
# types of attributes, with what they are in C
HANDLE, DATA_TYPE, BOOLEAN, INT64, FLOAT, POINTER, CONVOLUTION_MODE, HEURISTIC_MODE = 0, 1, 2, 3, 4, 6, 7, 8
POINTWISE_MODE, DESCRIPTOR = 14, 15
IN_C = {
    BOOLEAN: ctypes.c_bool,
    INT64: ctypes.c_int64,
    FLOAT: ctypes.c_float,
    **dict.fromkeys((HANDLE, POINTER, DESCRIPTOR), ctypes.c_void_p),
}
DATA = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 9}
PROPOSALS = 16  # that are asked for; the first that works is taken, so that all processes take the same


class Refused(RuntimeError):
    """cuDNN can't do what it was asked for; the message says which call."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor, rest: Tensor | None = None, stride: int = 1) -> Tensor:
    """conv(x, weight) + rest + bias on the current stream, padded by half the window.

    Args:
        x: [N, C, H, W], as weight [C', C, k, k], k odd, and rest with channels last and of one precision.
        bias: [C'].
        rest: [N, C', H', W'], is not changed.
    """
    if x.is_cuda:
        try:
            return _graphs().run(x, weight, bias, rest, stride)
        except Refused as reason:
            _warn(str(reason))
    out = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
    return out.contiguous(memory_format=torch.channels_last) if rest is None else out + rest


@functools.cache
def _warn(reason: str) -> None:
    log.warning("convolutions don't add residuals here, which torch does after them, slower: %s", reason)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libcudnn.so.9")
    except OSError:
        return None
    library.cudnnGetErrorString.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    if library is None:
        raise Refused("torch has no libcudnn.so.9")
    status = getattr(library, name)(*arguments)
    if status:
        raise Refused(f"{name}: {library.cudnnGetErrorString(status).decode()}")


class Descriptor:
    """One of cuDNN's, by its kind; attributes are (name, type, values)."""

    def __init__(self, kind: int, *attributes: tuple[int, int, list], finalize: bool = True) -> None:
        self.at = ctypes.c_void_p()
        self.kept = [x for _, _, values in attributes for x in values]  # what it points to
        self.destroy = _library().cudnnBackendDestroyDescriptor  # here also when the process ends
        _call("cudnnBackendCreateDescriptor", kind, ctypes.byref(self.at))
        for name, type_, values in attributes:
            plain = [x.at if isinstance(x, Descriptor) else x for x in values]
            array = (IN_C.get(type_, ctypes.c_int) * len(plain))(*plain)
            _call("cudnnBackendSetAttribute", self.at, name, type_, ctypes.c_int64(len(plain)), array)
        if finalize:
            _call("cudnnBackendFinalize", self.at)

    def __del__(self) -> None:
        if self.at:
            self.destroy(self.at)

    def read(self, name: int, type_: int, array: Any) -> int:
        """Fill `array`; returns how many there are."""
        count, size = ctypes.c_int64(), ctypes.c_int64(len(array))
        _call("cudnnBackendGetAttribute", self.at, name, type_, size, ctypes.byref(count), array)
        return count.value


@dataclass(frozen=True)
class Plan:
    descriptor: Descriptor
    workspace: int

    def run(self, handle: ctypes.c_void_p, tensors: list[Tensor]) -> None:
        room = torch.empty(self.workspace, dtype=torch.uint8, device=tensors[0].device)
        pack = Descriptor(
            PACK,
            (1000, INT64, list(range(1, len(tensors) + 1))),
            (1001, POINTER, [x.data_ptr() for x in tensors]),
            (1003, POINTER, [room.data_ptr() or None]),
        )
        _call("cudnnBackendExecute", handle, self.descriptor.at, pack.at)


class Graphs:
    """cuDNN's handles, and its plans by shape."""

    def __init__(self) -> None:
        self.handles: dict[int, ctypes.c_void_p] = {}
        self.plans: dict[tuple, Plan | Refused] = {}

    def run(self, x: Tensor, weight: Tensor, bias: Tensor, rest: Tensor | None, stride: int) -> Tensor:
        """As `convolve`; Refused where cuDNN has no plan, asked once a shape."""
        N, H, W = (x.shape[0], *((size - 1) // stride + 1 for size in x.shape[2:]))
        out = torch.empty(
            (N, len(weight), H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        last = [x, weight, *(() if rest is None else (rest,)), out]
        for each in last:  # cuDNN takes other strides, and writes as if they were these
            assert each.is_contiguous(memory_format=torch.channels_last), (each.shape, each.stride())
        tensors = [*last[:-1], bias.view(1, -1, 1, 1), out]
        handle = self._handle(x.device)
        _call("cudnnSetStream", handle, ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream))
        key = (stride, x.device, *((each.dtype, each.shape) for each in tensors))
        if key not in self.plans:
            try:
                self.plans[key] = _plan(handle, tensors, stride)
            except Refused as reason:
                self.plans[key] = reason
        plan = self.plans[key]
        if isinstance(plan, Refused):
            raise plan
        plan.run(handle, tensors)
        return out

    def _handle(self, device: torch.device) -> ctypes.c_void_p:
        if device.index not in self.handles:
            made = ctypes.c_void_p()
            with torch.cuda.device(device):
                _call("cudnnCreate", ctypes.byref(made))
            self.handles[device.index] = made
        return self.handles[device.index]


@functools.cache
def _graphs() -> Graphs:
    return Graphs()


def _plan(handle: ctypes.c_void_p, tensors: list[Tensor], stride: int) -> Plan:
    """The first of cuDNN's proposals for x, weight, what is added (perhaps the residual; the bias), out."""
    graph = _graph(handle, tensors, stride)
    heuristic = Descriptor(HEURISTICS, (201, DESCRIPTOR, [graph]), (200, HEURISTIC_MODE, [3]))
    configurations = [Descriptor(CONFIGURATION, finalize=False) for _ in range(PROPOSALS)]
    array = (ctypes.c_void_p * PROPOSALS)(*(each.at for each in configurations))
    for each in configurations[: heuristic.read(202, DESCRIPTOR, array)]:
        try:
            plan = Descriptor(PLAN, (400, HANDLE, [handle]), (401, DESCRIPTOR, [each]))
        except Refused:  # this one
            continue
        size = (ctypes.c_int64 * 1)()
        plan.read(402, INT64, size)
        plan.kept += [graph, heuristic]
        return Plan(plan, size[0])
    raise Refused(f"no plan for a convolution of {tuple(tensors[0].shape)} with {tuple(tensors[1].shape)}")


def _graph(handle: ctypes.c_void_p, tensors: list[Tensor], stride: int) -> Descriptor:
    x, weight, *added, out = tensors
    padding = weight.shape[-1] // 2
    real = [_tensor(i + 1, each, each.dtype) for i, each in enumerate(tensors)]
    between = [_tensor(i + 10, out, torch.float32, written=False) for i in range(len(added))]
    convolution = Descriptor(
        CONVOLUTION,
        (100, DATA_TYPE, [DATA[torch.float32]]),
        (101, CONVOLUTION_MODE, [1]),
        (106, INT64, [2]),
        (105, INT64, [padding] * 2),
        (104, INT64, [padding] * 2),
        (103, INT64, [stride] * 2),
        (102, INT64, [1, 1]),
    )
    product = Descriptor(
        CONVOLVE,
        (704, DESCRIPTOR, [real[0]]),
        (703, DESCRIPTOR, [real[1]]),
        (705, DESCRIPTOR, [between[0]]),
        (702, DESCRIPTOR, [convolution]),
        (700, FLOAT, [1.0]),
        (701, FLOAT, [0.0]),
    )
    add = Descriptor(POINTWISE, (0, POINTWISE_MODE, [0]), (1, DATA_TYPE, [DATA[torch.float32]]))
    sums = [
        Descriptor(
            POINT,
            (750, DESCRIPTOR, [add]),
            (751, DESCRIPTOR, [so_far]),
            (752, DESCRIPTOR, [term]),
            (753, DESCRIPTOR, [to]),
        )
        for so_far, term, to in zip(between, real[2:-1], [*between[1:], real[-1]], strict=True)
    ]
    return Descriptor(GRAPH, (800, HANDLE, [handle]), (801, DESCRIPTOR, [product, *sums]))


def _tensor(uid: int, like: Tensor, dtype: torch.dtype, written: bool = True) -> Descriptor:
    return Descriptor(
        TENSOR,
        (901, DATA_TYPE, [DATA[dtype]]),
        (902, INT64, list(like.shape)),
        (903, INT64, list(like.stride())),
        (906, INT64, [uid]),
        (900, INT64, [16]),
        (907, BOOLEAN, [not written]),
    )
