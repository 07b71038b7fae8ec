"""FP8 linears through Transformer Engine, inside megatron-core's blocks.

megatron-core puts TE's autocast round its layers; what it leaves to its caller is here:

    settings          a role's recipe in megatron-core's words
    reduce_over       `delayed` takes the largest value over a group, which megatron-core reads from its
                      global groups; without them TE would take every rank of the run. Here it is the tensor
                      ranks alone (megatron-core's tp_only_amax_red). Its recipe is made here too:
                      megatron-core 0.19.2 gives it an argument that TE 2.20 has no more
    quantise_again    the linears keep their quantised weights until they are told that these have changed
    cache_weights     or keep nothing: where passes are recorded and replayed
    update_scales     `delayed` renews its scales where a pass with gradients ends; the reference has none
    scales_kept       an evaluation between two steps leaves `delayed` as it was
    rehearsals        `delayed` starts from scales of 1, with which small gradients vanish

Scales are not saved: they follow from what is seen, whatever the layout. A run that goes on finds those of
`delayed` again by rehearsing its first step; its history of largest values starts anew. Scales and histories
are device memory that is renewed where it lies, so a recorded pass renews them too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nextvid_mcore.config import ConfigError, Fp8Config

AMAX_HISTORY = 64  # passes; every network's end of a pass counts as one for all (TE rolls them together)
REHEARSALS = 3  # the residual stream brings every layer its gradient at once, a layer's branch takes three
_NAMES = {"current": "tensorwise"}  # megatron-core's names where they are not ours
_CAPABILITY = {"current": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def settings(fp8: Fp8Config, role: str) -> dict[str, Any]:
    """Fields of TransformerConfig for `role`; empty without FP8."""
    recipe = fp8.of(role)
    if recipe == "none":
        return {}
    out: dict[str, Any] = {"fp8": fp8.format, "fp8_recipe": _NAMES.get(recipe, recipe)}
    if recipe == "delayed":
        return out
    return out | {
        "first_last_layers_bf16": fp8.bf16_first + fp8.bf16_last > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_first,
        "num_layers_at_end_in_bf16": fp8.bf16_last,
    }


def check_gpu(fp8: Fp8Config) -> None:
    """Raise ConfigError where this machine's GPU, which is there, has no such arithmetic."""
    if not fp8.used:
        return
    have, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    cuda = tuple(int(x) for x in (torch.version.cuda or "0.0").split(".")[:2])
    for role, recipe in fp8.used.items():
        needs = _CAPABILITY[recipe]
        reason = None
        if have < needs:
            reason = f"it needs compute capability {needs[0]}.{needs[1]} or higher"
        elif recipe == "mxfp8" and have >= (12, 0):
            reason = "Transformer Engine has it for compute capability 10 and 11 alone"
        elif recipe == "blockwise" and cuda < (12, 9):
            reason = f"it needs CUDA 12.9, and torch was built with {torch.version.cuda}"
        if reason is not None:
            there = [other for other, least in _CAPABILITY.items() if have >= least and other != recipe]
            way = f"use --fp8.{role} {there[0]} or none" if there else f"use --fp8.{role} none (bf16)"
            raise ConfigError(
                f"fp8 {role} {recipe} does not run on {name} (compute capability {have[0]}.{have[1]}): "
                f"{reason}; {way}"
            )


def reduce_over(config: TransformerConfig, group: dist.ProcessGroup) -> None:
    """Let `delayed` reduce over `group`: the tensor ranks, which gather each other's FP8 values.

    Data ranks multiply nothing of each other's. Their weights are the same, and so are these scales; scales
    of activations and gradients follow each rank's own clips.
    """
    if config.fp8 is None or config.fp8_recipe != "delayed":
        return
    from megatron.core.transformer import transformer_block

    config.amax_group = group
    transformer_block.get_fp8_context = _context


def _context(config: TransformerConfig, layer_no: int = -1, is_init: bool = False) -> AbstractContextManager:
    """megatron-core's get_fp8_context, with the configuration's own group."""
    from megatron.core import fp8_utils

    if is_init or not hasattr(config, "amax_group"):
        return fp8_utils.get_fp8_context(config, layer_no, is_init)
    from transformer_engine.pytorch import autocast

    return autocast(
        enabled=True,
        recipe=_delayed_recipe(config.fp8),
        amax_reduction_group=config.amax_group,
    )


@functools.cache
def _delayed_recipe(fp8_format: str) -> Any:
    from transformer_engine.common.recipe import DelayedScaling, Format

    return DelayedScaling(
        fp8_format={"hybrid": Format.HYBRID, "e4m3": Format.E4M3}[fp8_format],
        amax_history_len=AMAX_HISTORY,
        amax_compute_algo="max",
    )


def quantise_again(networks: Iterable[MegatronModule]) -> None:
    """The weights have changed: quantise them in the next forward pass, then keep that."""
    for network in networks:
        network.set_is_first_microbatch()  # does nothing without FP8


def cache_weights(networks: Iterable[MegatronModule], on: bool) -> None:
    """Whether linears keep their quantised weights between micro-batches; not where passes are recorded.

    Recorded as a first micro-batch's, a pass would set the weights' gradients at every replay and not add to
    them, since Transformer Engine writes them to the buffer itself; recorded as a later one's, it would never
    see new weights. And what an eager pass kept before, 3 bytes an encoder's weight strewn among its
    activations, nobody would read again.
    """
    for network in networks:
        for module in network.modules():
            if hasattr(module, "disable_parameter_transpose_cache"):
                module.disable_parameter_transpose_cache = not on
                module._fp8_workspaces.clear()


def update_scales(network: MegatronModule) -> None:
    """After the frozen `network`'s pass in training: take over the largest values that `delayed` has seen.

    As Transformer Engine does for the others, not inside `torch.no_grad()`: evaluation renews nothing.
    """
    if not _delayed(network) or not torch.is_grad_enabled():
        return
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


@contextlib.contextmanager
def scales_kept(networks: Iterable[MegatronModule]) -> Iterator[None]:
    """What is run inside leaves `delayed`'s scales and histories of largest values as they were."""
    put_back = keep_scales(networks)
    try:
        yield
    finally:
        put_back()


def keep_scales(networks: Iterable[MegatronModule]) -> Callable[[], None]:
    """What makes `delayed`'s scales and histories of largest values again what they are now."""
    states = [
        module.fp8_meta[key]
        for network in networks
        if _delayed(network)
        for module in network.modules()
        for key in ("scaling_fwd", "scaling_bwd")
        if key in getattr(module, "fp8_meta", {})
    ]
    tensors = [x for state in states for x in (state.scale, state.amax_history)]
    before = [x.clone() for x in tensors]

    def put_back() -> None:
        if tensors:
            torch._foreach_copy_(tensors, before)

    return put_back


def _delayed(network: MegatronModule) -> bool:
    return network.config.fp8 is not None and network.config.fp8_recipe == "delayed"


def rehearsals(fp8: Fp8Config) -> int:
    """Passes without an update before a process's first step."""
    return REHEARSALS if "delayed" in fp8.used.values() else 0
