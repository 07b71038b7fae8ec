"""A convolution that adds a residual and a bias to its product before it writes it: one graph of cuDNN's.

torch has no operation for it (its fused one ends in a ReLU), so cuDNN's backend interface is called directly,
in the library that torch has loaded; numbers are those of its cudnn_graph.h. For each shape the plans that
cuDNN proposes are timed once, and the fastest is kept, as torch does for plain convolutions.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLANS = 6  # of cuDNN's proposals, that are timed
TIMES = 3

# kinds of descriptors
POINTWISE, CONVOLUTION, HEURISTICS, CONFIGURATION, PLAN = 0, 1, 4, 3, 5
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


class Refused(RuntimeError):
    """cuDNN can't do what it was asked for; the message says which call."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcudnn.so.9")
    library.cudnnGetErrorString.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise Refused(f"{name}: {_library().cudnnGetErrorString(status).decode()}")


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
        count = ctypes.c_int64()
        size = ctypes.c_int64(len(array))
        _call("cudnnBackendGetAttribute", self.at, name, type_, size, ctypes.byref(count), array)
        return count.value


def _tensor(uid: int, like: Tensor | None, shape: Tensor, dtype: torch.dtype) -> Descriptor:
    """Of `like`, or of what has the shape and order of `shape` and is never written."""
    x = shape if like is None else like
    return Descriptor(
        TENSOR,
        (901, DATA_TYPE, [DATA[dtype]]),
        (902, INT64, list(x.shape)),
        (903, INT64, list(x.stride())),
        (906, INT64, [uid]),
        (900, INT64, [16]),
        (907, BOOLEAN, [like is None]),
    )


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


def proposals(handle: ctypes.c_void_p, tensors: list[Tensor], padding: int) -> list[Plan]:
    """cuDNN's plans for `ConvolutionSum.__call__`'s tensors, those that it thinks best first.

    Raises:
        Refused: it has none.
    """
    x, weight, rest, bias, out = tensors
    real = [_tensor(i + 1, each, each, each.dtype) for i, each in enumerate(tensors)]
    virtual = [_tensor(i + 10, None, rest, torch.float32) for i in range(2)]
    convolution = Descriptor(
        CONVOLUTION,
        (100, DATA_TYPE, [DATA[torch.float32]]),
        (101, CONVOLUTION_MODE, [1]),
        (106, INT64, [2]),
        (105, INT64, [padding] * 2),
        (104, INT64, [padding] * 2),
        (103, INT64, [1, 1]),
        (102, INT64, [1, 1]),
    )
    product = Descriptor(
        CONVOLVE,
        (704, DESCRIPTOR, [real[0]]),
        (703, DESCRIPTOR, [real[1]]),
        (705, DESCRIPTOR, [virtual[0]]),
        (702, DESCRIPTOR, [convolution]),
        (700, FLOAT, [1.0]),
        (701, FLOAT, [0.0]),
    )
    add = Descriptor(POINTWISE, (0, POINTWISE_MODE, [0]), (1, DATA_TYPE, [DATA[torch.float32]]))
    sums = [
        Descriptor(
            POINT,
            (750, DESCRIPTOR, [add]),
            (751, DESCRIPTOR, [a]),
            (752, DESCRIPTOR, [b]),
            (753, DESCRIPTOR, [c]),
        )
        for a, b, c in ((virtual[0], real[2], virtual[1]), (virtual[1], real[3], real[4]))
    ]
    graph = Descriptor(GRAPH, (800, HANDLE, [handle]), (801, DESCRIPTOR, [product, *sums]))
    found: list[Plan] = []
    for mode in (3, 2):  # what its heuristic proposes, and if none of it can be had, what always works
        configurations = [Descriptor(CONFIGURATION, finalize=False) for _ in range(16)]
        array = (ctypes.c_void_p * len(configurations))(*(each.at for each in configurations))
        try:
            heuristic = Descriptor(HEURISTICS, (201, DESCRIPTOR, [graph]), (200, HEURISTIC_MODE, [mode]))
            count = heuristic.read(202, DESCRIPTOR, array)
        except Refused:
            continue
        for each in configurations[:count]:
            try:
                plan = Descriptor(PLAN, (400, HANDLE, [handle]), (401, DESCRIPTOR, [each]))
            except Refused:  # this one
                continue
            size = (ctypes.c_int64 * 1)()
            plan.read(402, INT64, size)
            plan.kept += [graph, heuristic]
            found.append(Plan(plan, size[0]))
            if len(found) == PLANS:
                return found
        if found:
            return found
    raise Refused(f"no plan for a convolution of {tuple(x.shape)} with {tuple(weight.shape)} and its sum")


class ConvolutionSum:
    """conv(x, weight) + rest + bias -> out, on the current stream."""

    def __init__(self) -> None:
        self.handles: dict[int, ctypes.c_void_p] = {}
        self.plans: dict[tuple, Plan] = {}
        self.times: list[list[float]] = []  # ms of the plans that were tried, by shape

    def __call__(self, x: Tensor, weight: Tensor, rest: Tensor, bias: Tensor, out: Tensor) -> None:
        """x [N, C, H, W], weight [C', C, k, k], k odd, rest and out [N, C', H, W], all with their channels
        last, bias [C'].
        """
        for each in (x, weight, rest, out):  # cuDNN takes other strides, and writes as if they were these
            assert each.is_contiguous(memory_format=torch.channels_last), (each.shape, each.stride())
        tensors = [x, weight, rest, bias.view(1, -1, 1, 1), out]
        key = tuple((each.dtype, each.shape, each.stride(), each.device) for each in tensors)
        handle = self._handle(x.device)
        _call("cudnnSetStream", handle, ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream))
        if key not in self.plans:
            self.plans[key] = self._fastest(handle, tensors)
        self.plans[key].run(handle, tensors)

    def _handle(self, device: torch.device) -> ctypes.c_void_p:
        if device.index not in self.handles:
            made = ctypes.c_void_p()
            with torch.cuda.device(device):
                _call("cudnnCreate", ctypes.byref(made))
            self.handles[device.index] = made
        return self.handles[device.index]

    def _fastest(self, handle: ctypes.c_void_p, tensors: list[Tensor]) -> Plan:
        plans = proposals(handle, tensors, tensors[1].shape[-1] // 2)
        times = []
        for plan in plans:
            plan.run(handle, tensors)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(TIMES):
                plan.run(handle, tensors)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / TIMES)
        self.times.append(times)
        # the first of those that are as good, so that other processes choose it too
        return next(plan for plan, each in zip(plans, times, strict=True) if each <= 1.03 * min(times))


@functools.cache
def convolution_sum() -> ConvolutionSum:
    """This process's: all use the same plans, and get the same bits."""
    return ConvolutionSum()
