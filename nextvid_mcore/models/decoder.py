"""The flow-matching decoder (Section 3.4, Eq. 6-8): a DiT that turns z_t and noise into frame t.

Frame-isolated attention needs no mask: every (clip, mask, frame, tau sample) is a row of n tokens.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.flow import timestep_embedding
from nextvid_mcore.models import specs
from nextvid_mcore.models.adaln import Modulation, modulate
from nextvid_mcore.models.norm import mark_sequence_parallel
from nextvid_mcore.rope import angles, grid_positions

TAU_WIDTH = 256  # of the sinusoidal embedding, as in DiT


class Decoder(MegatronModule):
    """concat(z, noisy latent) -> linear -> DiT layers -> velocity."""

    def __init__(
        self, model: ModelConfig, channels: int, split: specs.Split, groups: ProcessGroupCollection
    ) -> None:
        config = specs.transformer_config(model.decoder, model, split)
        super().__init__(config=config)
        self.tp_group = groups.tp
        width, dtype = model.decoder.width, split.dtype
        self.input = torch.nn.Linear(width + channels, width, dtype=dtype)
        self.tau_embed = torch.nn.Sequential(
            torch.nn.Linear(TAU_WIDTH, width, dtype=dtype),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width, dtype=dtype),
        )
        self.block = specs.build_block(
            config,
            specs.decoder_layer(specs.get_backend(model.backend)),
            model.decoder.depth,
            None,
            groups,
        )
        self.final_adaln = Modulation(config, 2)
        self.output = torch.nn.Linear(width, channels, dtype=dtype)
        for module in (self.input, self.tau_embed, self.output):
            mark_sequence_parallel(module, config)
        rope = angles(grid_positions(1, model.grid, model.grid), model.decoder.head_width, model.rope_base)
        self.register_buffer("frame_angles", rope[:, None, None], persistent=False)  # [n, 1, 1, R]

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
        hidden = self.input(torch.cat([z, noisy.to(dtype)], dim=-1))
        condition = self.tau_embed(timestep_embedding(tau, TAU_WIDTH).to(dtype))[None]
        hidden = self.block(
            hidden_states=hidden,
            attention_mask=None,
            context=condition,
            rotary_pos_emb=self.frame_angles,
        )
        shift, scale = self.final_adaln(condition)
        return self.output(modulate(hidden, shift, scale, self.config.layernorm_epsilon))
