"""Configuration of a NExT-Vid encoder for transformers."""

from transformers import PretrainedConfig


class NextVidConfig(PretrainedConfig):
    """Sizes of the encoder (nextvid_mcore's names in brackets where they differ)."""

    model_type = "nextvid"

    def __init__(
        self,
        image_size: int = 256,
        num_frames: int = 16,  # frames
        patch_size: int = 16,
        tubelet_size: int = 2,
        hidden_size: int = 1024,  # width
        num_hidden_layers: int = 24,  # depth
        num_attention_heads: int = 16,  # heads
        intermediate_size: int = 4096,  # mlp_width
        layer_norm_eps: float = 1e-6,  # norm_eps
        rope_base: float = 10000.0,
        **kwargs,
    ) -> None:
        self.image_size = image_size
        self.num_frames = num_frames
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.rope_base = rope_base
        super().__init__(**kwargs)
