"""NExT-Vid in one module (Figure 2): what a rank holds of the four networks, and the losses (Eq. 9).

The roles stay apart: `student` (encoder and context projection), `reference`, `predictor`,
`decoder`. Under pipeline parallelism the last stage alone has a predictor and a decoder. Without
generation there is no decoder; without alignment the reference is only the EMA, and is not run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nextvid_mcore import flow
from nextvid_mcore.config import RunConfig
from nextvid_mcore.masking import ClipMasks
from nextvid_mcore.models.decoder import build_decoder
from nextvid_mcore.models.encoder import Encoder, Student, sequence_shard
from nextvid_mcore.models.init import init_weights
from nextvid_mcore.models.predictor import build_predictor
from nextvid_mcore.models.sequences import by_mask, full_sequence, predictor_sequence, student_sequence
from nextvid_mcore.models.specs import Split


@dataclass(frozen=True)
class MicroBatch:
    """What the networks need of a micro-batch, on their device.

    A rank has only the parts its role reads: `patches` on the first pipeline stage, where the losses are
    `features` (with alignment) and `latents` (with generation).
    """

    index: list[int]  # global sample indices, B of them
    seed: int  # of tau and noise
    token_frames: int  # t
    tau_samples: int  # K
    masks: ClipMasks  # over frames 0 .. t-2: the last frame's context is never used
    patches: Tensor | None = None  # visible patches [s, rows, patch_dim]
    features: Tensor | None = None  # of the reference encoder, [t * n, B, D]
    latents: Tensor | None = None  # [B, t, n, C]


@dataclass(frozen=True)
class LossTerms:
    """Losses before the mean, and the features that the collapse monitors look at."""

    z: Tensor  # this rank's tokens, detached: [n (/ tp), M, p, B, E]
    flow: Tensor | None = None  # [B, M, p, K]; None without generation, and so is tau
    tau: Tensor | None = None  # [B, M, p, K]
    align: Tensor | None = None  # [B, M, p]; None without alignment, and so are the two below
    target: Tensor | None = None  # [n (/ tp), 1, p, B, D]
    aligned: Tensor | None = None  # [n (/ tp), M, p, B, D]

    def total(self, config: RunConfig) -> Tensor:
        """Eq. 9 with Table 8's weights: means over clips, masks, frames and tau samples."""
        flow, align = (None if x is None else x.mean() for x in (self.flow, self.align))
        return config.loss.total(flow, align)


class NextVid(MegatronModule):
    """The networks of one rank."""

    def __init__(
        self, config: RunConfig, split: Split, groups: ProcessGroupCollection, channels: int
    ) -> None:
        """Build and fill.

        Args:
            config: the run.
            split: the layout's sizes.
            groups: the layout's groups.
            channels: C of the target; without generation it says nothing.
        """
        student = Student(config.model, split, groups)
        super().__init__(config=student.config)
        self.run, self.split, self.groups, self.tp_group = config, split, groups, groups.tp
        self.student = student
        self.reference = Encoder(config.model, split, groups).requires_grad_(False).eval()
        self.first, self.last = student.encoder.first, student.encoder.last
        if self.last:
            inner = Split(split.tensor, 1, split.sequence, split.recompute, None, split.dtype)
            alone = _without_pipeline(groups)
            self.predictor = build_predictor(config.model, inner, alone)
            if config.model.generate:
                self.decoder = build_decoder(config.model, channels, inner, alone)

    def roles(self) -> dict[str, MegatronModule]:
        """The trained modules of this rank by role."""
        roles: dict[str, MegatronModule] = {"student": self.student}
        if self.last:
            roles["predictor"] = self.predictor
            if self.run.model.generate:
                roles["decoder"] = self.decoder
        return roles

    def reset_parameters(self) -> None:
        """Fill every role from the seed; the reference starts as the student's copy."""
        train, std = self.run.train, self.run.model.init_std
        for role, module in self.roles().items():
            init_weights(module, role, self.groups, train.seed, std, train.init_noise)
        self.reference.load_state_dict(self.student.encoder.state_dict())

    def train(self, mode: bool = True) -> NextVid:
        super().train(mode)
        self.reference.eval()
        return self

    @torch.no_grad()
    def reference_features(self, patches: Tensor | None, token_frames: int) -> Tensor:
        """The reference encoder on all tokens (c' of Eq. 5).

        Args:
            patches: [t * n, B, patch_dim] on the first pipeline stage.
            token_frames: t.

        Returns:
            [t * n, B, D] on the last stage; hidden states [t * n (/ tp), B, D] before.
        """
        hidden = self.reference(patches, full_sequence(self.run.model, token_frames, _device(self)))
        if self.last and self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden

    def forward(self, batch: MicroBatch, encoder: Encoder | None = None) -> Tensor | LossTerms:
        """Loss terms on the last pipeline stage, hidden states [s (/ tp), rows, D] before.

        `encoder` replaces the student's own (held-out loss of the EMA weights).
        """
        sequence = student_sequence(self.run.model, batch.masks, _device(self))
        context = self.student(batch.patches, sequence, encoder)
        return self.losses(context, batch) if self.last else context

    def losses(self, context: Tensor, batch: MicroBatch) -> LossTerms:
        """Predict, align and decode (Eq. 3, 5, 8) from the projected context [s (/ tp), rows, E]."""
        model, device = self.run.model, _device(self)
        sequence = predictor_sequence(model, batch.masks, batch.token_frames, device)
        z = self.predictor(context, sequence)
        z = by_mask(z, batch.masks, batch.token_frames - 1, len(batch.index))  # [n, M, p, B, E]
        if self.config.sequence_parallel:  # from here on the share is one of each frame's tokens
            z = scatter_to_sequence_parallel_region(z.contiguous(), group=self.tp_group)
        terms: dict[str, Tensor] = {"z": z.detach()}
        if model.align:
            terms |= self._align(z, batch)
        if model.generate:
            terms |= self._flow(z, batch)
        return LossTerms(**terms)

    def _align(self, z: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Eq. 5: `align` and what it compares; z: [n (/ tp), M, p, B, E]."""
        aligned = self.predictor.align_head(z).float()
        target = self._align_target(batch)
        align = self._mean_over_tokens((aligned - target).square().mean(-1))
        return {
            "align": rearrange(align, "m p b -> b m p"),
            "target": target,
            "aligned": aligned.detach(),
        }

    def _align_target(self, batch: MicroBatch) -> Tensor:
        """Reference features of frames 1 .. t-1, this rank's tokens: [n (/ tp), 1, p, B, D]."""
        features = rearrange(batch.features, "(t n) b d -> n 1 t b d", t=batch.token_frames)[:, :, 1:]
        features = sequence_shard(features, self.groups, self.config.sequence_parallel).float()
        if self.run.model.align_target == "layernorm":
            features = F.layer_norm(features, features.shape[-1:], eps=self.run.model.norm_eps)
        return features

    def _flow(self, z: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Eq. 8: `flow` and its `tau`; z: [n (/ tp), M, p, B, E]."""
        latents = batch.latents[:, 1:]  # [B, p, n, C]
        tau, noise = flow.draw(
            batch.seed,
            batch.index,
            z.shape[1],
            latents.shape[1],
            batch.tau_samples,
            latents.shape[2],
            latents.shape[3],
            per=self.run.loss.tau,
            device=z.device,
        )
        data = latents[:, None, :, None]  # [B, 1, p, 1, n, C]
        noisy = flow.interpolate(noise, data, tau[..., None, None])
        velocity = flow.velocity(noise, data).expand_as(noise)
        noisy, velocity = (
            sequence_shard(
                rearrange(x, "b m p k n c -> n (m p k b) c"), self.groups, self.config.sequence_parallel
            )
            for x in (noisy, velocity)
        )
        rows = z[:, :, :, None].expand(-1, -1, -1, batch.tau_samples, -1, -1).flatten(1, 4)
        predicted = self.decoder(rows, noisy, rearrange(tau, "b m p k -> (m p k b)"))
        terms = self._mean_over_tokens((predicted.float() - velocity).square().mean(-1))
        b, m, p, k = tau.shape
        return {"tau": tau, "flow": rearrange(terms, "(m p k b) -> b m p k", b=b, m=m, p=p, k=k)}

    def _mean_over_tokens(self, x: Tensor) -> Tensor:
        """Mean over the leading token dimension, of which each tensor rank may hold a share."""
        if not self.config.sequence_parallel:
            return x.mean(0)
        share = x.sum(0) / (x.shape[0] * self.tp_group.size())
        return reduce_from_tensor_model_parallel_region(share, group=self.tp_group)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _without_pipeline(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The same groups as a stage of its own sees them: predictor and decoder are not pipelined."""
    alone = copy.copy(groups)
    alone.pp = groups.cp  # without context parallelism, this rank alone
    return alone
