"""torch's scaled_dot_product_attention, never by cuDNN.

In a recorded pass cuDNN's backward kernel makes garbage: a decoder of 64 tokens a row and heads of 32 had a
gradient norm of 88,794 instead of 3.186, or ended in an illegal memory access, where other kernels equal
the eager pass to the bit (torch 2.11, cuDNN 9.19, H100 and H200; benchmarks/RESULTS.md). torch may choose it
by itself, so it is ruled out wherever a gradient may be wanted.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def allowed(device: torch.device) -> AbstractContextManager[None]:
    """Inside, torch chooses among `KERNELS` on CUDA devices."""
    return sdpa_kernel(KERNELS) if device.type == "cuda" else contextlib.nullcontext()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries [rows, A, s, d] read keys and values [rows, A, t, d]; mask: bool, or what is added, or None."""
    with allowed(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
