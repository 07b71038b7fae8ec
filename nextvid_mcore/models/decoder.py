"""The flow-matching decoder (Section 3.4, Eq. 6-8): a DiT that turns z_t and noise into frame t.

Frame-isolated attention needs no mask: every (clip, mask, frame, tau sample) is a row of n tokens. How
z_t conditions a row is a switch; tau enters by AdaLN-zero always:

    concat      z and the noisy latent of a position are one token; self-attention. The paper's.
    cross       noisy tokens attend to z of their frame, not to each other (Table 5).
    cross_self  noisy tokens attend to z of their frame and to each other (Table 5).

The last two are the same network, parameter for parameter: keys and values of `cross_self`'s one
attention are those of z and of the noisy tokens together. In all three a layer has as many parameters.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.flow import TAU_WIDTH, timestep_embedding
from nextvid_mcore.models import carried, fused, specs
from nextvid_mcore.models.adaln import CrossSelfAdaLNLayer, Modulation, join
from nextvid_mcore.models.norm import mark_sequence_parallel
from nextvid_mcore.rope import angles, grid_positions, turns


class Decoder(MegatronModule):
    """concat(z, noisy latent) -> linear -> DiT layers -> velocity."""

    layer = staticmethod(specs.decoder_layer)

    def __init__(
        self, model: ModelConfig, channels: int, split: specs.Split, groups: ProcessGroupCollection
    ) -> None:
        config = specs.transformer_config(model.decoder, model, split)
        super().__init__(config=config)
        self.tp_group = groups.tp
        width, dtype = model.decoder.width, split.dtype
        self.input = torch.nn.Linear(self.input_width(width, channels), width, dtype=dtype)
        self.tau_embed = torch.nn.Sequential(
            torch.nn.Linear(TAU_WIDTH, width, dtype=dtype),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width, dtype=dtype),
        )
        self.block = specs.build_block(
            config,
            self.layer(specs.get_backend(model.backend, split.overlap, groups.tp)),
            model.decoder.depth,
            None,
            groups,
        )
        self.end = self.block.layers[-1].behind = carried.Link()  # to the last norm
        self.final_adaln = Modulation(config, 2)
        self.output = torch.nn.Linear(width, channels, dtype=dtype)
        for module in (self.input, self.tau_embed, self.output):
            mark_sequence_parallel(module, config)
        rope = angles(grid_positions(1, model.grid, model.grid), model.decoder.head_width, model.rope_base)
        self.register_buffer("frame_rope", turns(rope), persistent=False)  # [2, n, R / 2]

    def forward(self, z: Tensor, noisy: Tensor, tau: Tensor) -> Tensor:
        """The velocity (Eq. 8).

        Args:
            z: conditions [n (/ tp), rows, E].
            noisy: noisy latents [n (/ tp), rows, C].
            tau: [rows], in (0, 1).

        Returns:
            [n (/ tp), rows, C].
        """
        dtype = self.input.weight.dtype
        condition = self.tau_embed(timestep_embedding(tau, TAU_WIDTH).to(dtype))[None]
        hidden, added = self.layers(z, noisy.to(dtype), condition), self.end.take()
        shift, scale = self.final_adaln(condition)
        eps = self.config.layernorm_epsilon
        return self.output(fused.gated_norm(hidden, added, shift, scale, eps)[1])

    @staticmethod
    def input_width(width: int, channels: int) -> int:
        """Values that enter at a position."""
        return width + channels

    def layers(self, z: Tensor, noisy: Tensor, condition: Tensor) -> Tensor:
        """Input map and DiT layers, but for what waits at the end; condition: tau's vector [1, rows, E]."""
        return self.block(
            hidden_states=self.input(torch.cat([z, noisy], dim=-1)),
            attention_mask=None,
            context=condition,
            rotary_pos_emb=_in_rows(self.frame_rope, z.shape[1]),
        )


class CrossDecoder(Decoder):
    """noisy latent -> linear -> DiT layers that read z by cross-attention -> velocity."""

    layer = staticmethod(specs.cross_decoder_layer)

    @staticmethod
    def input_width(width: int, channels: int) -> int:
        return channels

    def layers(self, z: Tensor, noisy: Tensor, condition: Tensor) -> Tensor:
        return self.block(
            hidden_states=self.input(noisy),
            attention_mask=None,
            context=join(condition, z),
            rotary_pos_emb=tuple(_in_rows(x, z.shape[1]) for x in (self.frame_rope, self.key_rope())),
        )

    def key_rope(self) -> Tensor:
        """Turns of the keys: z has the positions of the noisy tokens."""
        return self.frame_rope


class CrossSelfDecoder(CrossDecoder):
    """The same with the noisy tokens among the keys."""

    @staticmethod
    def layer(backend: specs.Backend) -> specs.ModuleSpec:
        return specs.cross_decoder_layer(backend, CrossSelfAdaLNLayer)

    def key_rope(self) -> Tensor:
        """Keys are [z | noisy] on every tensor rank, so a gathered sequence repeats share by share."""
        shares = self.tp_group.size() if self.config.sequence_parallel else 1
        parts = self.frame_rope.chunk(shares, dim=1)
        return torch.cat([x for share in parts for x in (share, share)], dim=1)


def _in_rows(rope: Tensor, rows: int) -> Tensor:
    """[2, n, R / 2], the same in every row, as [2, n, rows, R / 2]."""
    return rope[:, :, None].expand(-1, -1, rows, -1).contiguous()


def build_decoder(
    model: ModelConfig, channels: int, split: specs.Split, groups: ProcessGroupCollection
) -> Decoder:
    """The decoder of `model.condition`."""
    kind = {"concat": Decoder, "cross": CrossDecoder, "cross_self": CrossSelfDecoder}[model.condition]
    return kind(model, channels, split, groups)
