"""Which attention kernel, backend and precision every module runs, once a run: OUT/modules/rank0.txt, ...

Most of it stands in the modules. Which kernel torch's scaled_dot_product_attention takes depends on the
shapes, the mask and the device, so it is asked at each kind of layer's first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from nextvid_mcore.models import kernels, padded, sdpa

COLUMNS = ("module", "parameters", "precision", "backend", "attention", "kernel")


def _core_attentions(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module.named_modules() if name.endswith("core_attention")]


def _sdpa_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Any) -> str:
    """What torch chooses for these [s, rows, A, d]; with a pattern, for its first stretch."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    kernel = kernels.choose(q, pattern)
    if kernel in (kernels.flex, kernels.prefix, kernels.stairs, kernels.whole):
        return f"{kernel.__name__} ({q.shape[2]} x {k.shape[2]} tokens, {q.shape[1]} heads of {q.shape[3]})"
    mask = None
    if kernel is padded.attend:
        q, k, v = pattern.padded.rows(q, k, v)
        mask = pattern.padded.bias(q.dtype)
    elif pattern is not None:
        first = pattern.stretches[0]
        mask = first.allowed
        q = q[:, :, first.q_start : first.q_stop]
        k, v = (x[:, :, first.k_start : first.k_stop] for x in (k, v))
    with sdpa.allowed(q.device):
        choice = SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=mask)).name
    shape = f"{q.shape[2]} x {k.shape[2]} tokens, {q.shape[1]} heads of {q.shape[3]}"
    return (
        f"sdpa {choice.removesuffix('_ATTENTION').lower()} ({shape}{', masked' if mask is not None else ''})"
    )


class Inventory:
    """The table of one rank; complete once every module has run."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """modules: by the name they have in the table."""
        self.rows: dict[str, dict[str, str]] = {}
        self._handles: list[Any] = []
        for name, module in modules.items():
            self._add(name, module)

    def _add(self, name: str, module: nn.Module) -> None:
        params = list(module.parameters())
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in params})
        classes = [type(part) for part in module.modules()]
        te = any(
            cls.__module__.startswith(("transformer_engine", "megatron.core.extensions")) for cls in classes
        )
        core = any(cls.__module__.startswith("megatron.core") for cls in classes)
        config = getattr(module, "config", None)
        fp8 = getattr(config, "fp8", None) and f"{config.fp8_recipe} {config.fp8}"
        row = {
            "module": name,
            "parameters": f"{sum(p.numel() for p in params):,}",
            "precision": ", ".join(kinds) + (f", fp8 {fp8}" if fp8 else "") or "-",
            "backend": "Transformer Engine" if te else "megatron-core" if core else "torch",
            "attention": "-",
            "kernel": "-",
        }
        attentions = _core_attentions(module)
        if attentions:
            layer = attentions[0][1]
            row["attention"] = f"{len(attentions)} x {type(layer).__name__}"
            row["kernel"] = "has not run"
            self._handles.append(layer.register_forward_pre_hook(self._hook(row), with_kwargs=True))
        self.rows[name] = row

    def _hook(self, row: dict[str, str]) -> Callable:
        def first_call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if row["kernel"] != "has not run":
                return
            if type(layer).__module__.startswith("nextvid_mcore"):
                row["kernel"] = _sdpa_kernel(*args[:3], kwargs.get("attention_bias"))
            else:
                row["kernel"] = f"{type(layer).__name__}'s own (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 tells)"

        return first_call

    def text(self) -> str:
        rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows.values()]
        widths = [max(len(row[column]) for row in rows) for column in COLUMNS]
        lines = (zip(COLUMNS, widths, strict=True) for _ in rows)
        cells = ([row[c].ljust(w) for c, w in line] for row, line in zip(rows, lines, strict=True))
        return "\n".join("  ".join(line).rstrip() for line in cells)

    def write(self, out: Path, rank: int, say: Callable[[str], None]) -> None:
        """After the first step: the rank's file, and the table on rank 0."""
        for handle in self._handles:
            handle.remove()
        folder = out / "modules"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{rank}.txt").write_text(self.text() + "\n")
        say(f"modules of rank 0 (of every rank: {folder}):\n{self.text()}")
