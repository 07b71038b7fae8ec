"""What the layout tests run on every rank, and how they put shards together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nextvid_mcore import recipes
from nextvid_mcore.config import RunConfig, StageConfig, TransformerShape
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
from nextvid_mcore.parallel.plan import check
from nextvid_mcore.parallel.seats import build_seats
from nextvid_mcore.schedule import Schedule
from nextvid_mcore.training.step import TrainStep

BATCH, MICRO = 4, 1  # two or more micro-batches in every layout of up to 2 data ranks
SHAPES = (
    TransformerShape(width=48, depth=4, heads=4, mlp=96),
    TransformerShape(width=32, depth=2, heads=4, mlp=64),
)


def small(shapes: tuple[TransformerShape, TransformerShape] = SHAPES, **parallel: object) -> RunConfig:
    """Two encoder layers a stage at least, noise in every zero, two stages with different frames.

    shapes: of the encoder, and of predictor and decoder.
    """
    encoder, generator = shapes
    return recipes.get("tiny").altered(
        model={"encoder": encoder, "predictor": generator, "decoder": generator, "image_size": 32},
        mask={"keep": (0.375, 0.25), "blocks": (4, 2), "scale": (0.15, 0.5)},
        stages=(
            StageConfig("a", 2, frames=8, batch=BATCH, lr_start=1e-3, lr_end=9e-4, tau_samples=4),
            StageConfig("b", 1, frames=12, batch=BATCH, lr_start=8e-4, lr_end=8e-4, flow_lr=2e-3),
        ),
        train={"init_noise": 0.02, "micro_batch": MICRO},
        parallel=parallel,
    )


def built(config: RunConfig) -> TrainStep:
    """This rank's part of a fresh run, checked as a run is."""
    init_distributed()
    seats = build_seats(check(config, dist.get_world_size()))
    seed_trackers(0, seats.home)
    return TrainStep(config, seats)


def gradients(step: TrainStep) -> dict[str, torch.Tensor]:
    """What the step's last pass left, by parameter."""
    named = step.model.named_parameters()
    return {name: p.main_grad.float().cpu().clone() for name, p in named if p.requires_grad}


def clips(
    config: RunConfig, point, data_rank: int, data_size: int, micro: int | None = None
) -> list[ClipBatch]:
    """The step's micro-batches of one replica: random pixels, a function of the sample index."""
    size, frames, out = config.model.image_size, point.stage.frames, []
    micro = micro or point.micro_batch
    for m in range(point.batch // (micro * data_size)):
        first = point.samples_before + m * micro * data_size + data_rank * micro
        index = list(range(first, first + micro))
        videos = []
        for i in index:
            generator = torch.Generator().manual_seed(1000 + i)
            # 4x4-pixel squares: something to predict
            coarse = torch.randint(0, 256, (3, frames, size // 4, size // 4), generator=generator)
            videos.append(coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8))
        out.append(
            ClipBatch(
                video=torch.stack(videos),
                index=torch.tensor(index),
                label=torch.full((micro,), -1),
                static=torch.zeros(micro, dtype=torch.bool),
                items=[""] * micro,
            )
        )
    return out


def shards(entries: dict[str, ShardedTensor], pick) -> list[tuple]:
    """(key, global shape, global offset incl. the layer axis, tensor) of every picked local tensor."""
    out = []
    for entry in entries.values():
        if isinstance(entry, ShardedTensor):
            tensor = pick(entry.data)
            if tensor is not None:
                out.append(
                    (entry.key, entry.global_shape, entry.global_offset, tensor.detach().cpu().clone())
                )
    return out


def assemble(per_rank: list[list[tuple]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' shards; every element must be covered, copies must agree."""
    whole: dict[str, torch.Tensor] = {}
    for rank in per_rank:
        for key, shape, offset, tensor in rank:
            full = whole.setdefault(key, torch.full(shape, float("nan")))
            view = full
            axes = len(shape) - tensor.dim()
            for o in offset[:axes]:
                view = view[o]
            for dim, o in enumerate(offset[axes:]):
                view = view.narrow(dim, o, tensor.shape[dim])
            new = view.isnan()
            torch.testing.assert_close(
                view[~new], tensor[~new], rtol=1e-5, atol=1e-7, msg=f"{key}: copies differ between ranks"
            )
            view.copy_(tensor)
    for key, full in whole.items():
        assert not full.isnan().any(), f"{key} is not covered by the ranks"
    return whole


def schedule(config: RunConfig) -> Schedule:
    return Schedule(config)
