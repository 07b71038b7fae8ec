"""The ViT encoder (Section 3.4, "Encoder"): patches of visible tokens in, context features out.

The same class is the student and the reference encoder; the reference has frozen parameters and is
given every token.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.models import specs
from nextvid_mcore.models.norm import mark_sequence_parallel
from nextvid_mcore.models.sequences import Sequence


def sequence_shard(x: Tensor, groups: ProcessGroupCollection, sequence_parallel: bool) -> Tensor:
    """This rank's share of the leading dimension under sequence parallelism, else `x` itself."""
    return x.chunk(groups.tp.size(), dim=0)[groups.tp.rank()] if sequence_parallel else x


class Encoder(MegatronModule):
    """Patch embedding (first pipeline stage), transformer layers, final norm (last stage)."""

    def __init__(self, model: ModelConfig, split: specs.Split, groups: ProcessGroupCollection) -> None:
        config = specs.transformer_config(model.encoder, model, split)
        super().__init__(config=config)
        self.groups, self.tp_group = groups, groups.tp
        self.first = groups.pp.rank() == 0
        self.last = groups.pp.rank() == groups.pp.size() - 1
        backend = specs.get_backend(model.backend, split.overlap, groups.tp)
        if self.first:
            self.patch_embed = torch.nn.Linear(model.patch_dim, model.encoder.width, dtype=split.dtype)
            mark_sequence_parallel(self.patch_embed, config)
        self.block = specs.build_block(
            config,
            specs.encoder_layer(backend),
            specs.local_layers(model.encoder.depth, split, groups.pp.rank()),
            backend.norm,
            groups,
            self.first,
            self.last,
        )

    def set_input_tensor(self, tensor: Tensor | list[Tensor] | None) -> None:
        """Hidden states from the previous pipeline stage, [s (/ tp), rows, D]."""
        self.block.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, patches: Tensor | None, sequence: Sequence) -> Tensor:
        """Encode.

        Args:
            patches: [s, rows, patch_dim] in [-1, 1] on the first pipeline stage, else None.
            sequence: rotary turns and pattern of the tokens.

        Returns:
            [s (/ tp under sequence parallelism), rows, D]; normed on the last stage.
        """
        hidden = None
        if self.first:
            shard = sequence_shard(patches, self.groups, self.config.sequence_parallel)
            # one product: of patches that lie clip by clip torch makes as many as there are tokens
            hidden = self.patch_embed(shard.to(self.patch_embed.weight.dtype).contiguous())
        return self.block(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=sequence.rope,
            attention_bias=sequence.pattern,
        )


class Student(MegatronModule):
    """The trained encoder, and the projection D -> E of its context.

    The projection counts as the predictor's, yet stands on the encoder's side of the cut: what
    crosses to the predictor is then 3.7 times smaller (ViT-G).
    """

    def __init__(self, model: ModelConfig, split: specs.Split, groups: ProcessGroupCollection) -> None:
        encoder = Encoder(model, split, groups)
        super().__init__(config=encoder.config)
        self.tp_group = groups.tp
        self.encoder = encoder
        if encoder.last:
            self.context_projection = torch.nn.Linear(
                model.encoder.width, model.predictor.width, dtype=split.dtype
            )
            mark_sequence_parallel(self.context_projection, encoder.config)

    def forward(self, patches: Tensor | None, sequence: Sequence, encoder: Encoder | None = None) -> Tensor:
        """Context [s (/ tp), rows, E] on the last pipeline stage, hidden states [.., D] before.

        `encoder` replaces the student's own (held-out loss of the EMA weights).
        """
        hidden = (encoder or self.encoder)(patches, sequence)
        return self.context_projection(hidden) if self.encoder.last else hidden
