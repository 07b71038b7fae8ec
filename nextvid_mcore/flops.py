"""Parameters and FLOPs of a run by formula (Tables 7 and 8): for plans, placement and MFU.

Counted are the multiply-adds (two FLOPs each) of linear layers, convolutions and attention scores and
values, over visible (query, key) pairs only; norms, activations, rotary embedding and softmax are not.
A trained role's backward is twice its forward; the reference has none; recomputation does not count.

Two figures per clip. The nominal one is the paper's: every frame goes through the student, and masks
show what Table 8's blocks leave on average. The executed one is what this program runs: the student
never sees the last token frame, and mode `fixed` keeps exact counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nextvid_mcore.config import ModelConfig, RunConfig, StageConfig, TransformerShape
from nextvid_mcore.flow import TAU_WIDTH
from nextvid_mcore.masking import mean_shares

VAE_CHANNELS = 32  # VA-VAE f16d32: per video frame and latent position
KNN_SHARE = 0.02  # of a run's work that the online kNN may take


@dataclass(frozen=True)
class Parameters:
    """Parameters of each network."""

    encoder: int
    context_projection: int
    predictor: int
    decoder: int

    @property
    def student(self) -> int:
        """The role: encoder and context projection."""
        return self.encoder + self.context_projection

    @property
    def predictor_of_paper(self) -> int:
        """Table 7's predictor, which owns the context projection."""
        return self.predictor + self.context_projection


@dataclass(frozen=True)
class RoleFlops:
    """FLOPs of one training clip (all masks, forward and backward) by role."""

    student: float
    reference: float
    predictor: float
    decoder: float

    @property
    def total(self) -> float:
        """Model FLOPs; the frozen target's come on top (`target_flops`)."""
        return self.student + self.reference + self.predictor + self.decoder


def target_channels(config: RunConfig) -> int:
    """C: values of one target token."""
    if config.target.kind == "pixels":
        return config.model.patch_dim
    if config.target.checkpoint is None and config.target.kind == "va_vae":
        return VAE_CHANNELS * config.model.tubelet_size
    from nextvid_mcore import targets  # it reads the sizes of the target's file

    return targets.target_channels(config)


def parameters(model: ModelConfig, channels: int) -> Parameters:
    """Parameters by role, for target tokens of `channels` values; 0 for a role that is switched off.

    Cross- and self-attention have the same number, so neither a joint predictor nor what the decoder
    attends to changes a layer's.
    """
    D, E = model.encoder.width, model.predictor.width
    e, p, d = model.encoder, model.predictor, model.decoder
    entry = channels + (E if model.condition == "concat" else 0)  # values at a position of the decoder
    encoder_layer = _linear(D, 3 * D) + _linear(D, D) + _mlp(e) + 2 * _norm(D)
    predictor_layer = _linear(E, E) + _linear(E, 2 * E) + _linear(E, E) + _mlp(p) + 2 * _norm(E)
    decoder_layer = _linear(E, 3 * E) + _linear(E, E) + _mlp(d) + _linear(E, 6 * E)
    decoder = (
        _linear(entry, E)
        + _linear(TAU_WIDTH, E)
        + _linear(E, E)
        + d.depth * decoder_layer
        + _linear(E, 2 * E)
        + _linear(E, channels)
    )
    align_head = _linear(E, D) if model.align else 0
    return Parameters(
        encoder=_linear(model.patch_dim, D) + e.depth * encoder_layer + _norm(D),
        context_projection=_linear(D, E),
        predictor=E + p.depth * predictor_layer + _norm(E) + align_head,  # E: the query
        decoder=decoder if model.generate else 0,
    )


def clip_flops(config: RunConfig, stage: StageConfig, executed: bool = False) -> RoleFlops:
    """FLOPs of one training clip of `stage`: the paper's nominal figure, or what is really executed.

    In mode `truncate` the executed figure is an upper bound: the cut depends on the micro-batch.
    """
    model, n = config.model, config.model.tokens_per_frame
    t = model.token_frames(stage.frames)
    p, frames = t - 1, t - 1 if executed else t
    if executed and config.mask.static:
        visible = [float(count) for count in config.mask.counts(n)]
    else:
        visible = [share * n for share in mean_shares(config.mask, model.grid)]
    D, E = model.encoder.width, model.predictor.width
    student = sum(_encoder(model, v, frames) + 2 * D * E * v * frames for v in visible)
    predictor = sum(_predictor(model, v, frames, p) for v in visible)
    decoder = reference = 0.0
    if model.generate:
        decoder = len(visible) * _decoder(model, target_channels(config), p * stage.tau_samples)
    if model.align:
        reference = _encoder(model, n, t)
    return RoleFlops(student=3 * student, reference=reference, predictor=3 * predictor, decoder=3 * decoder)


def encoder_forward(model: ModelConfig, frames: int) -> float:
    """FLOPs of one clip of `frames` video frames through the encoder, forward only, nothing masked."""
    return _encoder(model, model.tokens_per_frame, model.token_frames(frames))


def knn_share(config: RunConfig) -> float:
    """FLOPs of the online kNN over those of the steps from one to the next, in the cheapest stage."""
    forward = config.eval.knn_samples * encoder_forward(config.model, config.stages[0].frames)
    steps = (config.batch(stage) * clip_flops(config, stage).total for stage in config.stages)
    return forward / (config.eval.knn_every * min(steps))


def knn_note(config: RunConfig) -> str:
    """What the online kNN will cost, for the plan and the log."""
    share, every = knn_share(config), config.eval.knn_every
    clips = f"up to {config.eval.knn_samples:,} clips"
    text = f"online kNN: {clips} every {every:,} steps, {share:.2%} of the FLOPs"
    if share > KNN_SHARE:
        least = math.ceil(every * share / KNN_SHARE)
        text += f"; --eval.knn-every {least:,} or fewer --eval.knn-samples keep it under {KNN_SHARE:.0%}"
    return text


def target_flops(config: RunConfig, stage: StageConfig) -> float:
    """FLOPs of the frozen target's network for one clip (targets/cost.py), nothing for pixels."""
    kind = config.target.kind
    if kind == "pixels" or not config.model.generate:
        return 0.0
    from nextvid_mcore.targets import cost  # it reads the target's file

    count = {"va_vae": cost.va_vae_flops, "siglip2": cost.siglip2_flops, "cosmos": cost.cosmos_flops}[kind]
    return count(config.target.checkpoint, config.model, stage.frames)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp(shape: TransformerShape) -> int:
    return _linear(shape.width, shape.mlp) + _linear(shape.mlp, shape.width)


def _norm(width: int) -> int:
    return 2 * width


def _encoder(model: ModelConfig, v: float, frames: int) -> float:
    """Forward of the encoder on v tokens in each of `frames` frames; frame-causal attention."""
    D, tokens = model.encoder.width, v * frames
    pairs = v * v * frames * (frames + 1) / 2
    layer = 2 * (4 * D * D + 2 * D * model.encoder.mlp) * tokens + 4 * D * pairs
    return 2 * model.patch_dim * D * tokens + model.encoder.depth * layer


def _predictor(model: ModelConfig, v: float, frames: int, p: int) -> float:
    """Forward of the predictor: queries of p frames on v visible tokens of each earlier frame.

    Joint: the context tokens go through every layer too, and queries also see their own frame's.
    """
    E, n, mlp = model.predictor.width, model.tokens_per_frame, model.predictor.mlp
    queries, context = p * n, v * frames
    pairs = n * v * p * (p + 1) / 2
    if model.context == "joint":
        pairs += v * v * frames * (frames + 1) / 2 + p * n * n
        layer = 2 * (4 * E * E + 2 * E * mlp) * (queries + context) + 4 * E * pairs
    else:
        layer = 2 * (2 * E * E + 2 * E * mlp) * queries + 2 * 2 * E * E * context + 4 * E * pairs
    align_head = 2 * E * model.encoder.width * queries if model.align else 0
    return model.predictor.depth * layer + align_head


def _decoder(model: ModelConfig, channels: int, frames: int) -> float:
    """Forward of the decoder on `frames` noisy frames (predicted frames x tau samples), each by itself."""
    E, n = model.decoder.width, model.tokens_per_frame
    keys = 2 * n if model.condition == "cross_self" else n
    layer = 2 * (2 * E * E + 2 * E * model.decoder.mlp) * n + 2 * 2 * E * E * keys  # q, out, MLP; k, v
    layer += 4 * E * n * keys + 2 * 6 * E * E
    entry = channels + (E if model.condition == "concat" else 0)
    edges = 2 * entry * E * n + 2 * E * channels * n
    condition = 2 * (TAU_WIDTH * E + E * E) + 2 * 2 * E * E
    return frames * (model.decoder.depth * layer + edges + condition)
