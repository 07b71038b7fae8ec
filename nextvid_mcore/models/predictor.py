"""The autoregressive predictor (Section 3.2, Eq. 3 and 5), context-isolated or, for Table 2, joint.

One learned query, zero at the start, stands at every position of every frame but the first; 3D RoPE
tells the positions apart. The query of frame t reads the contexts c_0 .. c_{t-1}.

    isolated  each layer reads the fixed context by cross-attention. The paper's.
    joint     "C-Iso." off: context and queries are one sequence, and every layer's self-attention
              updates both. Context is frame-causal; queries see those of their own frame too.

Both have the same sizes, and the same number of parameters.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.models import specs
from nextvid_mcore.models.encoder import sequence_shard
from nextvid_mcore.models.norm import mark_sequence_parallel
from nextvid_mcore.models.sequences import CrossSequence, JointSequence


class Predictor(MegatronModule):
    """Cross-attention layers, a norm, and the linear map E -> D that alignment compares."""

    layer = staticmethod(specs.predictor_layer)

    def __init__(self, model: ModelConfig, split: specs.Split, groups: ProcessGroupCollection) -> None:
        config = specs.transformer_config(model.predictor, model, split)
        super().__init__(config=config)
        self.groups, self.tp_group = groups, groups.tp
        backend = specs.get_backend(model.backend, split.overlap, groups.tp)
        width = model.predictor.width
        self.query = torch.nn.Parameter(torch.zeros(width, dtype=split.dtype))
        self.query.sequence_parallel = config.sequence_parallel
        self.block = specs.build_block(
            config, self.layer(backend), model.predictor.depth, backend.norm, groups
        )
        if model.align:
            self.align_head = torch.nn.Linear(width, model.encoder.width, dtype=split.dtype)
            mark_sequence_parallel(self.align_head, config)

    def forward(self, context: Tensor, sequence: CrossSequence) -> Tensor:
        """z [queries, rows, E], whole on every tensor rank, from the context [s (/ tp), rows, E]."""
        share = self.tp_group.size() if self.config.sequence_parallel else 1
        queries = self.query.expand(sequence.queries // share, context.shape[1], -1).contiguous()
        z = self.block(
            hidden_states=queries,
            attention_mask=None,
            context=context,
            rotary_pos_emb=(sequence.query_rope, sequence.key_rope),
            attention_bias=sequence.pattern,
        )
        return self._gathered(z, shares_differ=False)

    def _gathered(self, x: Tensor, shares_differ: bool) -> Tensor:
        """The whole sequence from this rank's share.

        shares_differ: what each tensor rank does with the whole differs, so that its gradients must be
            summed; else every rank has the whole gradient.
        """
        if not self.config.sequence_parallel:
            return x
        return gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=shares_differ, group=self.tp_group
        )


class JointPredictor(Predictor):
    """Self-attention layers over context and queries together."""

    layer = staticmethod(specs.encoder_layer)

    def forward(self, context: Tensor, sequence: JointSequence) -> Tensor:
        """z [queries, rows, E], whole on every tensor rank, from the context [s (/ tp), rows, E]."""
        context = self._gathered(context, shares_differ=True)  # each rank goes on with its share of it
        queries = self.query.expand(sequence.queries, context.shape[1], -1)
        parts = [part for place in sequence.contexts for part in (context[place], queries)]
        hidden = self.block(
            hidden_states=sequence_shard(torch.cat(parts), self.groups, self.config.sequence_parallel),
            attention_mask=None,
            rotary_pos_emb=sequence.rope,
            attention_bias=sequence.pattern,
        )
        whole = self._gathered(hidden, shares_differ=False).split([len(part) for part in parts])
        return torch.cat(whole[1::2])


def build_predictor(model: ModelConfig, split: specs.Split, groups: ProcessGroupCollection) -> Predictor:
    """The predictor of `model.context`."""
    kind = {"isolated": Predictor, "joint": JointPredictor}[model.context]
    return kind(model, split, groups)
