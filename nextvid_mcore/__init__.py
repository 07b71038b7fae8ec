"""nextvid_mcore: autoregressive next-frame video pretraining (NExT-Vid) on megatron-core.

The shape alphabet, used in every docstring and shape comment of the package:

    B   clips in a micro-batch of one rank
    T   video frames of a clip (16 or 64)            t   token frames, T / tubelet_size (8 or 32)
    H W height and width of a frame in pixels        h w token rows and columns, H / patch_size
    n   tokens of one frame, h * w                   p   predicted frames, t - 1 (frames 1 .. t-1)
    M   masks of a clip (Table 8: 2)                 v   visible tokens of a frame under one mask
    s   length of a token sequence                   D   width of the encoder
    E   width of predictor and decoder (384)         C   channels of a target token (64 for VA-VAE)
    K   tau samples (Table 8: 4, later 1)            A   attention heads;  d  width of one head
    R   dimensions of a head that 3D RoPE turns      rows  sequences side by side: B, or 1 where packed masks
                                                           lie end to end; of the decoder B * M * p * K

Hidden states inside megatron-core are sequence first, [s, rows, D]. Under sequence parallelism a rank
holds s / tensor of them, written s (/ tp). The context c, the prediction z and tau are the paper's (Eq. 3,
5, 8). docs/architecture.md follows a micro-batch through the code.

This module imports nothing: `nextvid_mcore.hub` must load where only torch is installed.
"""

__version__ = "0.1.0"
