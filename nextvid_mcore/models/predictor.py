"""The context-isolated autoregressive predictor (Section 3.2, Eq. 3 and 5).

One learned query, zero at the start, stands at every position of every frame but the first; 3D RoPE
tells the positions apart. Each layer reads the fixed context by cross-attention with the
autoregressive mask: the query of frame t sees contexts c_0 .. c_{t-1}.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.models import specs
from nextvid_mcore.models.norm import mark_sequence_parallel
from nextvid_mcore.models.sequences import CrossSequence


class Predictor(MegatronModule):
    """Cross-attention layers, a norm, and the linear map E -> D that alignment compares."""

    def __init__(self, model: ModelConfig, split: specs.Split, groups: ProcessGroupCollection) -> None:
        config = specs.transformer_config(model.predictor, model, split)
        super().__init__(config=config)
        self.tp_group = groups.tp
        backend = specs.get_backend(model.backend)
        width = model.predictor.width
        self.query = torch.nn.Parameter(torch.zeros(width, dtype=split.dtype))
        self.query.sequence_parallel = config.sequence_parallel
        self.block = specs.build_block(
            config, specs.predictor_layer(backend), model.predictor.depth, backend.norm, groups
        )
        self.align_head = torch.nn.Linear(width, model.encoder.width, dtype=split.dtype)
        mark_sequence_parallel(self.align_head, config)

    def forward(self, context: Tensor, sequence: CrossSequence) -> Tensor:
        """z [queries (/ tp), rows, E] from the projected context [s (/ tp), rows, E]."""
        share = self.tp_group.size() if self.config.sequence_parallel else 1
        queries = self.query.expand(sequence.queries // share, context.shape[1], -1).contiguous()
        return self.block(
            hidden_states=queries,
            attention_mask=None,
            context=context,
            rotary_pos_emb=(sequence.query_angles, sequence.key_angles),
            attention_bias=sequence.pattern,
        )
