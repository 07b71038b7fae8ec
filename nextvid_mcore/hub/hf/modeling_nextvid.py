"""A NExT-Vid encoder as a transformers model: a thin shell round vit.py, which does all the work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_nextvid import NextVidConfig
from .vit import VisionTransformer


class NextVidModel(PreTrainedModel):
    """Video [B, T, 3, H, W] -> features [B, t*h*w, D] in (t, h, w) order."""

    config_class = NextVidConfig
    main_input_name = "pixel_values_videos"

    def __init__(self, config: NextVidConfig) -> None:
        super().__init__(config)
        self.vit = VisionTransformer(
            image_size=config.image_size,
            frames=config.num_frames,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            rope_base=config.rope_base,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        pixel_values_videos: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        """pixel_values_videos: [B, T, 3, H, W] in [-1, 1], T a multiple of the tubelet size, as the
        processor makes them. `hidden_states`: the embedded patches, then the output of every block, without
        the final norm."""
        if kwargs:
            raise TypeError(f"NextVidModel does not know {', '.join(sorted(kwargs))}")
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2] != 3:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}: give [B, T, 3, H, W], as "
                "the processor makes them"
            )
        video = pixel_values_videos.transpose(1, 2)  # [B, 3, T, H, W]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = None
        if wanted:
            embed = self.vit.patch_embed
            hidden = (
                embed(self.vit.patchify(video).to(embed.weight.dtype)),
                *self.vit(video, return_layers=range(self.vit.depth), norm_layers=False),
            )
            last = self.vit.norm(hidden[-1])
        else:
            last = self.vit(video)
        if return_dict is False:
            return (last,) if hidden is None else (last, hidden)
        return BaseModelOutput(last_hidden_state=last, hidden_states=hidden)

    def forward_features(self, video: Tensor) -> Tensor:
        """timm's way: video [B, 3, T, H, W] -> [B, t*h*w, D]."""
        return self.vit.forward_features(video)

    def get_intermediate_layers(self, video: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """Of `VisionTransformer` in vit.py; video [B, 3, T, H, W]."""
        return self.vit.get_intermediate_layers(video, *args, **kwargs)
