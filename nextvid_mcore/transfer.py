"""Tensors on their way from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: str | torch.device) -> Tensor:
    """`x` on the device; from pinned memory, so that the host does not wait for what the device is doing."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
