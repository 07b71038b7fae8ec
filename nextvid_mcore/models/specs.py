"""megatron-core layer specs for the three kinds of layer, with two backends.

`local` builds from torch and megatron-core's own parallel linears and runs anywhere; `te` builds the
same layers, with the same parameter names, from Transformer Engine's modules and needs CUDA. `auto`, which
the paper's recipes have, is `te` where it can run; the plan and the log say what came of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from nextvid_mcore.config import ConfigError, ModelConfig, TransformerShape
from nextvid_mcore.models import carried, fp8, overlapped
from nextvid_mcore.models.adaln import AdaLNLayer, CrossAdaLNLayer
from nextvid_mcore.models.attention import PatternAttention
from nextvid_mcore.models.layers import (
    ContextLayer,
    EncoderLayer,
    FusedMLP,
    PatternCrossAttention,
    PatternSelfAttention,
)
from nextvid_mcore.models.norm import local_norm
from nextvid_mcore.parallel import mailbox

Overlap = Literal["never", "recorded", "always"]


@dataclass(frozen=True)
class Backend:
    """The classes a layer is built from."""

    column: Any
    row: Any
    norm: Any


def resolve(name: str) -> tuple[str, str]:
    """The backend that `name` means on this machine, and why where `auto` had the choice."""
    if name != "auto":
        return name, ""
    if not torch.cuda.is_available():
        return "local", "no CUDA GPU is visible"
    if not te.HAVE_TE:
        return "local", "Transformer Engine is not installed"
    return "te", "Transformer Engine and a GPU are there"


def backend_note(name: str) -> str:
    """For the plan and the log: `backend: te`, or what `auto` is here."""
    chosen, why = resolve(name)
    return f"backend: {chosen}" if chosen == name else f"backend: auto, which is {chosen} ({why})"


def get_backend(
    name: str, overlap: Overlap = "never", group: torch.distributed.ProcessGroup | None = None
) -> Backend:
    """`local`, `te` or `auto`.

    Args:
        overlap: in which passes the linears exchange rows beside their products.
        group: of the tensor ranks that exchange them.

    Raises:
        ConfigError: `te` where Transformer Engine or CUDA is missing; overlap `always` where it can't be.
    """
    if overlap != "never":
        plain, always = get_backend(name), overlap == "always"
        if not mailbox.usable(group, always):
            return plain
        return Backend(overlapped.column(plain.column, always), overlapped.row(plain.row, always), plain.norm)
    name, _ = resolve(name)
    if name == "local":
        return Backend(ColumnParallelLinear, RowParallelLinear, local_norm())
    if name != "te":
        raise ConfigError(f"unknown backend {name!r}; there are local, te and auto")
    if not te.HAVE_TE:
        raise ConfigError(
            "backend te needs Transformer Engine, which is not installed: on a machine with CUDA, in the "
            "clone, pip install --no-build-isolation -c constraints.txt -e '.[train,gpu]' (README.md), or "
            "use --model.backend local"
        )
    if not torch.cuda.is_available():
        raise ConfigError("backend te needs a CUDA GPU and none is visible; use --model.backend local")
    return Backend(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm)


def _mlp(backend: Backend) -> Any:
    return functools.partial(
        FusedMLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=backend.column, linear_fc2=backend.row),
    )


def _self_attention(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=PatternSelfAttention,
        params={"attn_mask_type": AttnMaskType.arbitrary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column, core_attention=PatternAttention, linear_proj=backend.row
        ),
    )


def _cross_attention(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=PatternCrossAttention,
        params={"attn_mask_type": AttnMaskType.arbitrary},
        submodules=CrossAttentionSubmodules(
            linear_q=backend.column,
            linear_kv=backend.column,
            core_attention=PatternAttention,
            linear_proj=backend.row,
        ),
    )


def encoder_layer(backend: Backend) -> ModuleSpec:
    """Pre-norm ViT layer."""
    return ModuleSpec(
        module=EncoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=_self_attention(backend),
            pre_mlp_layernorm=backend.norm,
            mlp=_mlp(backend),
        ),
    )


def predictor_layer(backend: Backend) -> ModuleSpec:
    """Q-former style layer: cross-attention to the context, then MLP."""
    return ModuleSpec(
        module=ContextLayer,
        submodules=TransformerLayerSubmodules(
            pre_cross_attn_layernorm=backend.norm,
            cross_attention=_cross_attention(backend),
            pre_mlp_layernorm=backend.norm,
            mlp=_mlp(backend),
        ),
    )


def decoder_layer(backend: Backend) -> ModuleSpec:
    """DiT layer; its norms without scale and shift belong to the layer itself (models/adaln.py)."""
    return ModuleSpec(
        module=AdaLNLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_self_attention(backend),
            mlp=_mlp(backend),
        ),
    )


def cross_decoder_layer(backend: Backend, layer: type[CrossAdaLNLayer] = CrossAdaLNLayer) -> ModuleSpec:
    """DiT layer that reads the prediction by cross-attention (Table 5)."""
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            cross_attention=_cross_attention(backend),
            mlp=_mlp(backend),
        ),
    )


@dataclass(frozen=True)
class Split:
    """What a network must know of its layout beside the groups themselves."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    recompute: str = "none"
    last_stage_layers: int | None = None  # encoder layers on the last of several pipeline stages
    dtype: torch.dtype = torch.float32
    exchange: bool = False  # its sequences cross to ranks of another layout
    overlap: Overlap = "never"  # passes in which its linears exchange rows beside their products
    fp8: dict[str, Any] = field(default_factory=dict)  # models/fp8.py: settings of the role


def local_layers(depth: int, split: Split, stage: int) -> int:
    """Encoder layers on pipeline stage `stage`."""
    if split.pipeline == 1:
        return depth
    if stage == split.pipeline - 1:
        return split.last_stage_layers
    return (depth - split.last_stage_layers) // (split.pipeline - 1)


def transformer_config(shape: TransformerShape, model: ModelConfig, split: Split) -> TransformerConfig:
    """megatron-core's configuration of one of our networks."""
    recompute: dict[str, Any] = {}
    if split.recompute == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif split.recompute == "core_attn":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    if split.pipeline > 1:
        recompute["num_layers_in_last_pipeline_stage"] = split.last_stage_layers
    on_gpu, fused = torch.cuda.is_available(), resolve(model.backend)[0] == "te"
    config = TransformerConfig(
        num_layers=shape.depth,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.mlp,
        tensor_model_parallel_size=split.tensor,
        pipeline_model_parallel_size=split.pipeline,
        pipeline_dtype=split.dtype,
        sequence_parallel=split.sequence and split.tensor > 1,
        params_dtype=split.dtype,
        bf16=split.dtype == torch.bfloat16,
        transformer_impl="transformer_engine" if fused else "local",
        # models/init.py fills every tensor from its name, so that no layout changes the start
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        normalization="LayerNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=F.gelu,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        # Transformer Engine's weight gradients add themselves to the fp32 buffer
        gradient_accumulation_fusion=fused,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=False,
        # between groups lengths differ from call to call; then megatron-core asks for this dispatcher
        variable_seq_lengths=split.exchange,
        moe_token_dispatcher_type="alltoall",
        **recompute,
        **split.fp8,
    )
    config.recompute_pieces = split.recompute == "pieces"  # megatron-core's own name for nothing
    return config


def build_block(
    config: TransformerConfig,
    layer: ModuleSpec,
    layers: int,
    norm: Any | None,
    groups: ProcessGroupCollection,
    first: bool = True,
    last: bool = True,
) -> TransformerBlock:
    """A TransformerBlock of `layers` local layers, with `norm` at its end on the last stage."""
    fp8.reduce_over(config, groups.tp)
    block = TransformerBlock(
        config=config,
        spec=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm),
        post_layer_norm=norm is not None,
        pre_process=first,
        post_process=last,
        pg_collection=groups,
    )
    carried.link(block.layers)
    return block
