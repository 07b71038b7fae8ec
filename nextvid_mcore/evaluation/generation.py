"""Generating with exported networks: next frames of a masked clip, and a roll-out from a seed (Figure 5).

Masked: every frame is predicted from the visible tokens of the true frames before it, as in training.
Autoregressive: the next token frame is predicted from all frames so far, decoded to pixels by the target,
appended, and read again by the encoder. A token frame's velocity is integrated from noise (flow.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextvid_mcore import flow, hub
from nextvid_mcore.config import (
    DataConfig,
    MaskConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    TargetConfig,
    TransformerShape,
    require,
)
from nextvid_mcore.rng import torch_generator
from nextvid_mcore.targets import Target

Solver = Callable[[flow.Velocity, Tensor, int], Tensor]
SOLVERS: dict[str, Solver] = {"euler": flow.euler, "midpoint": flow.midpoint}


@dataclass(frozen=True)
class Networks:
    """The three exported networks."""

    encoder: hub.VisionTransformer
    predictor: hub.Predictor
    decoder: hub.Decoder

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Networks:
        """From a folder of tools/convert_to_torch.py --all."""
        loaders = (hub.load_encoder, hub.load_predictor, hub.load_decoder)
        return cls(*(load(folder, device) for load in loaders))

    @torch.no_grad()
    def generate(
        self, video: Tensor, tokens: Tensor, noise: Tensor, steps: int, solver: Solver = flow.midpoint
    ) -> Tensor:
        """Frames 1 .. p of video [B, 3, T, H, W] from its visible tokens [B, s]: noise to latents, both
        [B, p, n, C]."""
        frames = range(1, noise.shape[1] + 1)
        z, _ = self.predictor(self.encoder(video, tokens), tokens, frames=frames)
        return self._integrate(z, noise, steps, solver)

    @torch.no_grad()
    def next_frame(
        self,
        video: Tensor,
        noise: Tensor,
        steps: int,
        solver: Solver = flow.midpoint,
        keep: int | None = None,
    ) -> Tensor:
        """The token frame after video [B, 3, T, H, W]: noise to latents, both [B, 1, n, C].

        keep: at most so many of the last token frames are read; None: all of them.
        """
        tubelet = self.encoder.tubelet_size
        if keep is not None:
            video = video[:, :, -keep * tubelet :]
        t, n = video.shape[2] // tubelet, noise.shape[2]
        tokens = torch.arange(t * n, device=video.device).expand(len(video), -1)
        z, _ = self.predictor(self.encoder(video), tokens, frames=[t])
        return self._integrate(z, noise, steps, solver)

    def _integrate(self, z: Tensor, noise: Tensor, steps: int, solver: Solver) -> Tensor:
        def velocity(x: Tensor, tau: float) -> Tensor:
            times = torch.full(x.shape[:2], tau, device=x.device)
            return self.decoder(x.flatten(1, 2), times, z).view_as(x)

        return solver(velocity, noise, steps)


def draw_noise(seed: int, clip: int, sample: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal [1, *shape], a function of (seed, clip, sample)."""
    return torch.randn(1, *shape, generator=torch_generator(seed, "noise", clip, sample))


def roll_out(
    networks: Networks,
    target: Target,
    start: Tensor,
    token_frames: int,
    noise: Tensor,
    steps: int,
    solver: Solver = flow.midpoint,
    keep: int | None = None,
) -> Tensor:
    """start [B, 3, T0, H, W] and `token_frames` generated ones after it: [B, 3, T0 + tubelet * frames, H, W].

    noise: [B, token_frames, n, C]. Pixels are clamped to [-1, 1] before they are read again.
    """
    require(
        not getattr(target, "false_colour", False),
        "this target can't be decoded to pixels, so nothing can be fed back; use --mode masked",
    )
    require(
        token_frames >= 1 and noise.shape[1] == token_frames,
        f"a roll-out of {token_frames} token frames has noise for {noise.shape[1]}",
    )
    tubelet = networks.encoder.tubelet_size
    require(
        start.shape[2] >= tubelet and start.shape[2] % tubelet == 0,
        f"a roll-out starts from whole token frames of {tubelet} frames, got {start.shape[2]} frames",
    )
    video = start
    for frame in range(token_frames):
        latents = networks.next_frame(video, noise[:, frame : frame + 1], steps, solver, keep)
        video = torch.cat((video, target.decode(latents).to(video).clamp(-1, 1)), dim=2)
    return video


def run_config_of(config: dict, fps: float = 4.0) -> RunConfig:
    """A RunConfig with the shapes, the target and the made clips of an exported config.json; its masks are
    Table 8's, of the nearest whole number of tokens."""

    def shape(prefix: str) -> TransformerShape:
        width, depth, heads, mlp = (config[f"{prefix}{k}"] for k in ("width", "depth", "heads", "mlp_width"))
        return TransformerShape(width=width, depth=depth, heads=heads, mlp=mlp)

    model = ModelConfig(
        encoder=shape(""),
        predictor=shape("predictor_"),
        decoder=shape("decoder_"),
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        tubelet_size=config["tubelet_size"],
        rope_base=config["rope_base"],
        norm_eps=config["norm_eps"],
    )
    n, table = model.tokens_per_frame, MaskConfig()
    mask = dataclasses.replace(table, keep=tuple(max(1, round(share * n)) / n for share in table.keep))
    stage = StageConfig("export", 1, frames=config["frames"], batch=1, lr_start=0.0, lr_end=0.0)
    target = TargetConfig(config["target_kind"], pixel_scale=config["target_pixel_scale"])
    made = config["clips"] or None
    data = DataConfig(manifest=made, eval_manifest=made, fps=fps)
    return RunConfig(config["recipe"], model, (stage,), mask=mask, target=target, data=data)
