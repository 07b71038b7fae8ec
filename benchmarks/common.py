# ruff: noqa: E402 (the clone is put on the path first)
"""What the benchmarks share: a training step on clips and latents that already lie on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

from nextvid_mcore.pretrain import quiet

quiet()  # before megatron-core is imported

from nextvid_mcore.config import ModelConfig, RunConfig
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.models import fp8
from nextvid_mcore.models.nextvid import NextVid
from nextvid_mcore.models.specs import get_backend
from nextvid_mcore.parallel import plan
from nextvid_mcore.parallel.groups import seed_trackers
from nextvid_mcore.parallel.placement import Placement, resolve_placement
from nextvid_mcore.parallel.seats import build_seats
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.targets import target_channels
from nextvid_mcore.targets.autoencoder import AutoencoderKL
from nextvid_mcore.targets.va_vae import VA_VAE, VaVae
from nextvid_mcore.training import graphs
from nextvid_mcore.training import step as training_step
from nextvid_mcore.training.microbatch import Outline
from nextvid_mcore.training.step import StepResult, TrainStep

PEAK_BF16 = 989e12  # dense FLOP/s of one H100 or H200


def check(config: RunConfig, world: int) -> None:
    """Raise ConfigError where this machine's `world` processes can't take a step of `config`.

    As at the start of a run, but no data, weights of a target or evaluation are asked for.
    """
    placement = plan.check(config.altered(eval={"every": 0, "knn_every": 0}), world, dry_run=True)
    get_backend("te" if config.fp8.used else config.model.backend)
    fp8.check_gpu(config.fp8)
    graphs.wanted(config, placement)


class ResidentTarget:
    """Random latents that lie on the device: the step without its target's cost."""

    def __init__(self, model: ModelConfig, channels: int) -> None:
        self.model, self.channels = model, channels

    @functools.cache  # noqa: B019 (lives as long as the benchmark)
    def _latents(self, clips: int, frames: int, device: torch.device) -> torch.Tensor:
        shape = (clips, self.model.token_frames(frames), self.model.tokens_per_frame, self.channels)
        return torch.randn(*shape, device=device)

    def latents(
        self, video: torch.Tensor, static: object = None, indices: object = None, first: int = 0
    ) -> torch.Tensor:
        return self._latents(video.shape[0], video.shape[2], video.device)[:, first:]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("resident latents are random: there is no video behind them")


def _draw_on_device(model: NextVid) -> None:
    """Random weights of a fresh run's sizes, without a run's reproducible draws on the CPU."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.0 if name.endswith("bias") else 0.02)


@contextlib.contextmanager
def quick_start(target: Callable[[RunConfig], Any] | None = None) -> Iterator[None]:
    """A TrainStep built inside starts from weights drawn on the device, with `target` or resident latents."""

    def resident(config: RunConfig, device: torch.device, dtype: torch.dtype) -> ResidentTarget:
        return ResidentTarget(config.model, target_channels(config))

    with (
        mock.patch.object(training_step, "build_target", target or resident),
        mock.patch.object(NextVid, "reset_parameters", _draw_on_device),
    ):
        yield


def online_vae_target(config: RunConfig, device: torch.device, dtype: torch.dtype) -> VaVae:
    """VA-VAE with random weights of its shape, read from files as a run's is: for `quick_start`."""
    with tempfile.TemporaryDirectory() as folder:
        weights, statistics = Path(folder, "va_vae.pt"), Path(folder, "latents_stats.pt")
        torch.save({"state_dict": AutoencoderKL().state_dict()}, weights)
        numbers = {"mean": torch.zeros(VA_VAE.latent), "std": torch.ones(VA_VAE.latent)}
        torch.save(numbers, statistics)
        files = dataclasses.replace(config.target, checkpoint=str(weights), statistics=str(statistics))
        return VaVae.from_files(dataclasses.replace(config, target=files), device, dtype)


@dataclass(frozen=True)
class Measured:
    """seconds: of a step, the mean of many in a row. gib: the most this GPU has reserved; nan without one."""

    seconds: float
    gib: float
    loss: float


class Bench:
    """This rank's part of a run, ready to take the first step of its first stage again and again."""

    def __init__(self, config: RunConfig) -> None:
        self.placement: Placement = resolve_placement(config, dist.get_world_size())
        seats = build_seats(self.placement)
        seed_trackers(0, seats.home)
        self.step = TrainStep(config, seats)
        if self.step.engine.graphs is not None and dist.get_rank() == 0:
            self.step.engine.graphs.say = print
        self.point = Schedule(config).at(0)
        self.cuda = self.step.device.type == "cuda"
        self.clips = self._clips(config)

    def _clips(self, config: RunConfig) -> list[ClipBatch]:
        """Random clips of this rank's first seat, the same video for every micro-batch."""
        stage, model, device = self.point.stage, config.model, self.step.device
        seat = self.step.seats.mine[0]
        b = self.placement.clips(seat, self.point.micro_batch)
        size = model.image_size if seat.sees_video else 0
        generator = torch.Generator(device).manual_seed(dist.get_rank())
        video = torch.randint(
            0, 256, (b, 3, stage.frames, size, size), dtype=torch.uint8, device=device, generator=generator
        )
        encoder = self.placement.encoder.layout
        wave = self.point.micro_batch * encoder.data
        return [
            ClipBatch(
                video=video,
                index=torch.arange(b) + first + b * self.step.seats.home.data_rank,
                label=torch.full((b,), -1),
                static=torch.zeros(b, dtype=torch.bool),
                items=[""] * b,
            )
            for first in range(0, self.point.batch, wave)
        ]

    def run(self) -> StepResult:
        """One step, which knows, as in a run, what the next one begins with."""
        coming = Outline.of(self.clips[0], self.point.stage.tau_samples)
        return self.step.run(self.point, self.clips, coming)

    def take(self) -> StepResult:
        """One step, finished."""
        result = self.run()
        self.synchronize()
        return result

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, steps: int, warmup: int, ready: Callable[[], None] | None = None) -> Measured:
        """Time `steps` steps after `warmup` ones, or as many as it takes until passes are recorded.

        `ready` is called in between.
        """
        if self.step.engine.graphs is not None:
            warmup = max(warmup, -(-graphs.WARM // len(self.clips)) + 1)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(warmup):
            self.take()
        if ready is not None:
            ready()
        self.synchronize()
        start, loss = time.perf_counter(), math.nan
        for _ in range(steps):
            loss = self.run().loss
        self.synchronize()
        seconds = (time.perf_counter() - start) / steps
        gib = torch.cuda.max_memory_reserved() / 2**30 if self.cuda else math.nan
        return Measured(seconds, gib, loss)
