"""NExT-Vid in one module (Figure 2): what a rank holds of the four networks, and the losses (Eq. 9).

The roles stay apart: `student` (encoder and context projection), `reference`, `predictor`,
`decoder`. A rank has those that sit there: all, under pipeline parallelism only the last stage's
predictor and decoder, or a single one in a group of its own. Without generation there is no decoder;
without alignment the reference is only the EMA, and is not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
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
from nextvid_mcore.models import fused
from nextvid_mcore.models.decoder import build_decoder
from nextvid_mcore.models.encoder import Encoder, Student, sequence_shard
from nextvid_mcore.models.init import init_weights
from nextvid_mcore.models.places import Place
from nextvid_mcore.models.predictor import build_predictor
from nextvid_mcore.models.sequences import by_mask, full_sequence, predictor_sequence, student_sequence

TRAINED = ("student", "predictor", "decoder")


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
    draws: tuple[Tensor, Tensor] | None = None  # tau and noise of `flow.draw`; None: drawn when needed
    latents: Tensor | None = None  # of the predicted frames 1 .. t-1, [B, p, n, C]

    def draw(self, config: RunConfig, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """tau and noise of `flow.draw` for these clips' latents of C = `channels`."""
        return flow.draw(
            self.seed,
            self.index,
            config.mask.masks,
            self.token_frames - 1,
            self.tau_samples,
            config.model.tokens_per_frame,
            channels,
            per=config.loss.tau,
            device=device,
        )


@dataclass(frozen=True)
class LossTerms:
    """Losses before the mean, and the features that the collapse monitors look at."""

    z: Tensor | None = None  # this rank's tokens, detached: [n (/ tp), M, p, B, E]
    flow: Tensor | None = None  # [B, M, p, K]; None without generation, and so is tau
    tau: Tensor | None = None  # [B, M, p, K]
    align: Tensor | None = None  # [B, M, p]; None without alignment, and so are the two below
    target: Tensor | None = None  # [n (/ tp), 1, p, B, D]
    aligned: Tensor | None = None  # [n (/ tp), M, p, B, D]
    moments: tuple[Tensor, ...] = ()  # what the monitors keep of z, target and aligned, in their place

    def detached(self) -> LossTerms:
        """The same numbers without their history."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return LossTerms(**{k: x.detach() if isinstance(x, Tensor) else x for k, x in fields.items()})

    def total(self, config: RunConfig) -> Tensor:
        """Eq. 9 with Table 8's weights: means over clips, masks, frames and tau samples."""
        flow, align = (None if x is None else x.mean() for x in (self.flow, self.align))
        return config.loss.total(flow, align)


class NextVid(MegatronModule):
    """The networks of one rank."""

    def __init__(self, config: RunConfig, places: Mapping[str, Place], channels: int) -> None:
        """Build the roles of `places`.

        Args:
            config: the run.
            places: of student, reference, predictor and decoder those that sit on this rank.
            channels: C of the target; without generation it says nothing.
        """
        model = config.model
        parts: dict[str, MegatronModule] = {}
        if "student" in places:
            parts["student"] = Student(model, places["student"].split, places["student"].groups)
        if "reference" in places:
            reference = Encoder(model, places["reference"].split, places["reference"].groups)
            parts["reference"] = reference.requires_grad_(False).eval()
        if "predictor" in places:
            parts["predictor"] = build_predictor(model, places["predictor"].split, places["predictor"].groups)
        if "decoder" in places and model.generate:
            decoder = places["decoder"]
            parts["decoder"] = build_decoder(model, channels, decoder.split, decoder.groups)
        super().__init__(config=next(iter(parts.values())).config)
        self.run, self.places = config, dict(places)
        for name, module in parts.items():
            self.add_module(name, module)
        self.holds = frozenset(parts)
        encoders = [parts[name] for name in ("student", "reference") if name in parts]
        encoders = [getattr(module, "encoder", module) for module in encoders]
        self.first = any(encoder.first for encoder in encoders)  # it reads patches
        self.last = bool(self.holds & {"predictor", "decoder"})  # it has a loss

    def roles(self) -> dict[str, MegatronModule]:
        """The trained modules of this rank by role."""
        return {role: getattr(self, role) for role in TRAINED if role in self.holds}

    def reset_parameters(self) -> None:
        """Fill every role from the seed; the reference starts as the student's copy."""
        train, std = self.run.train, self.run.model.init_std
        for role in self.holds:
            init_weights(
                getattr(self, role),
                "student.encoder" if role == "reference" else role,
                self.places[role].groups,
                train.seed,
                std,
                train.init_noise,
            )

    def train(self, mode: bool = True) -> NextVid:
        super().train(mode)
        if "reference" in self.holds:
            self.reference.eval()
        return self

    @torch.no_grad()
    def reference_features(self, patches: Tensor | None, token_frames: int, clips: int) -> Tensor:
        """The reference encoder on all tokens (c' of Eq. 5).

        Args:
            patches: [t * n, B, patch_dim] on the first pipeline stage.
            token_frames: t.
            clips: B.

        Returns:
            [t * n, B, D] on the last stage; hidden states [t * n (/ tp), B, D] before.
        """
        place = self.places["reference"]
        sequence = full_sequence(self.run.model, token_frames, clips, _device(self))
        hidden = self.reference(patches, sequence)
        if self.reference.last and place.sequence:
            hidden = gather_from_sequence_parallel_region(hidden, group=place.groups.tp)
        return hidden

    def context(self, batch: MicroBatch, encoder: Encoder | None = None) -> Tensor:
        """The projected context [s (/ tp), rows, E] on the last pipeline stage, hidden states before.

        `encoder` replaces the student's own (held-out loss of the EMA weights).
        """
        sequence = student_sequence(self.run.model, batch.masks, _device(self))
        return self.student(batch.patches, sequence, encoder)

    def forward(self, batch: MicroBatch, encoder: Encoder | None = None) -> Tensor | LossTerms:
        """Loss terms where all roles sit together, hidden states on pipeline stages before the last."""
        context = self.context(batch, encoder)
        return self.losses(context, batch) if self.last else context

    def losses(self, context: Tensor, batch: MicroBatch) -> LossTerms:
        """Predict, align and decode from the projected context [s (/ tp), rows, E]."""
        z = self.shares("predictor", self.predict(context, batch), batch)
        terms: dict[str, Tensor] = {"z": z.detach()}
        if self.run.model.align:
            terms |= self.alignment(z, batch)
        if self.run.model.generate:
            terms |= self.flow_matching(z, batch)
        return LossTerms(**terms)

    def predict(self, context: Tensor, batch: MicroBatch) -> Tensor:
        """Eq. 3: z, whole on every tensor rank, [queries, rows, E]."""
        sequence = predictor_sequence(self.run.model, batch.masks, batch.token_frames, _device(self))
        return self.predictor(context, sequence)

    def shares(self, role: str, z: Tensor, batch: MicroBatch) -> Tensor:
        """The predictor's output by mask and frame, as `role` takes it: [n (/ tp), M, p, B, E].

        Under sequence parallelism the share is one of each frame's tokens.
        """
        z = by_mask(z, batch.masks, batch.token_frames - 1, len(batch.index))
        place = self.places[role]
        return scatter_to_sequence_parallel_region(z.contiguous(), place.groups.tp) if place.sequence else z

    def alignment(self, z: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Eq. 5: `align` and what it compares; z: [n (/ tp), M, p, B, E]."""
        aligned, target = self.predictor.align_head(z), self._align_target(batch)
        error = fused.squared_error(aligned.flatten(2, 3), target.flatten(2, 3))
        align = self._mean_over_tokens("predictor", error.unflatten(2, aligned.shape[2:4]))
        return {
            "align": rearrange(align, "m p b -> b m p"),
            "target": target,
            "aligned": aligned.detach(),
        }

    def _align_target(self, batch: MicroBatch) -> Tensor:
        """Reference features of frames 1 .. t-1, this rank's tokens: [n (/ tp), 1, p, B, D]."""
        features = rearrange(batch.features, "(t n) b d -> n 1 t b d", t=batch.token_frames)[:, :, 1:]
        place = self.places["predictor"]
        features = sequence_shard(features, place.groups, place.sequence).float()
        if self.run.model.align_target == "layernorm":
            features = F.layer_norm(features, features.shape[-1:], eps=self.run.model.norm_eps)
        return features

    def flow_matching(self, z: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Eq. 8: `flow` and its `tau`; z: [n (/ tp), M, p, B, E]."""
        latents, place = batch.latents, self.places["decoder"]
        tau, noise = batch.draws or batch.draw(self.run, latents.shape[-1], latents.device)
        data = latents[:, None, :, None]  # [B, 1, p, 1, n, C]
        noisy = flow.interpolate(noise, data, tau[..., None, None])
        velocity = flow.velocity(noise, data).expand_as(noise)
        noisy, velocity = (
            sequence_shard(rearrange(x, "b m p k n c -> n (m p k b) c"), place.groups, place.sequence)
            for x in (noisy, velocity)
        )
        rows = z[:, :, :, None].expand(-1, -1, -1, batch.tau_samples, -1, -1).flatten(1, 4)
        predicted = self.decoder(rows, noisy, rearrange(tau, "b m p k -> (m p k b)"))
        terms = self._mean_over_tokens("decoder", (predicted.float() - velocity).square().mean(-1))
        b, m, p, k = tau.shape
        return {"tau": tau, "flow": rearrange(terms, "(m p k b) -> b m p k", b=b, m=m, p=p, k=k)}

    def _mean_over_tokens(self, role: str, x: Tensor) -> Tensor:
        """Mean over the leading token dimension, of which each tensor rank may hold a share."""
        place = self.places[role]
        if not place.sequence:
            return x.mean(0)
        share = x.sum(0) / (x.shape[0] * place.groups.tp.size())
        return reduce_from_tensor_model_parallel_region(share, group=place.groups.tp)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
