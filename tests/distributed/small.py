"""A very small NExT-Vid with its optimizers on any layout, and its whole state put together again."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import torch

from nextvid_mcore import recipes
from nextvid_mcore.config import RunConfig, TransformerShape
from nextvid_mcore.masking import draw_masks
from nextvid_mcore.models import fused
from nextvid_mcore.models.nextvid import MicroBatch, NextVid
from nextvid_mcore.models.places import together
from nextvid_mcore.models.sequences import patchify, visible_patches
from nextvid_mcore.models.specs import Split
from nextvid_mcore.parallel.groups import Layout, build_groups, init_distributed, seed_trackers
from nextvid_mcore.training import saving
from nextvid_mcore.training.optimizer import RoleOptimizers, finalize_grads, wrap_roles

CHANNELS, T, CLIPS = 12, 4, 4
RATES = SimpleNamespace(lr=1e-2, lr_flow=3e-2)


def config(ema: float = 0.9, **train: Any) -> RunConfig:
    """Grid 4 x 4; every zero-initialised tensor filled with noise."""
    shape = TransformerShape(width=24, depth=2, heads=2, mlp=40)
    shapes = {"encoder": shape, "predictor": shape, "decoder": shape}
    return recipes.get("tiny").altered(
        model=shapes | {"image_size": 32, "patch_size": 8},
        mask={"keep": (0.375, 0.25)},
        optim={"ema": ema, "clip": 0.5},
        train={"init_noise": 0.02} | train,
    )


def build(
    layout: Layout, settings: RunConfig | None = None, dtype: torch.dtype = torch.float32, **ddp: Any
) -> tuple[NextVid, RoleOptimizers]:
    """Model and optimizers of this rank. ddp: settings of wrap_roles."""
    init_distributed(60)
    settings = settings or config()
    fused.use(settings.model.compile)
    groups = build_groups(layout, timeout=60)
    seed_trackers(0, groups)
    last = settings.model.encoder.depth // layout.pipeline
    split = Split(layout.tensor, layout.pipeline, layout.sequence, last_stage_layers=last, dtype=dtype)
    model = NextVid(settings, together(split, groups.collection), CHANNELS)
    if torch.cuda.is_available():
        model.cuda()
    model.reset_parameters()
    wrapped = wrap_roles(model, groups, **ddp)
    optimizers = RoleOptimizers(wrapped, settings.optim, groups, model.reference)
    optimizers.set_lr(RATES)
    return model, optimizers


def forward(model: NextVid, data_rank: int, data: int, step: int) -> torch.Tensor:
    """Loss of this replica's share of CLIPS clips."""
    settings = model.run
    generator = torch.Generator().manual_seed(100 + step)
    size = settings.model.image_size
    device = next(model.parameters()).device
    video = (torch.rand(CLIPS, 3, T * 2, size, size, generator=generator) * 2 - 1).to(device)
    n = settings.model.tokens_per_frame
    latents = torch.randn(CLIPS, T - 1, n, CHANNELS, generator=generator).to(device)
    mine = range(CLIPS)[data_rank * CLIPS // data : (data_rank + 1) * CLIPS // data]
    index = [1000 * step + i for i in mine]
    patches = patchify(video[list(mine)], settings.model)
    masks = draw_masks(settings.mask, settings.model.grid, T - 1, settings.train.seed, index)
    batch = MicroBatch(
        index=index,
        seed=settings.train.seed,
        token_frames=T,
        tau_samples=1,
        masks=masks,
        patches=visible_patches(patches, masks),
        features=model.reference_features(patches.transpose(0, 1), T, len(patches)),
        latents=latents[list(mine)],
    )
    return model(batch).total(settings)


def train_step(model: NextVid, optimizers: RoleOptimizers, step: int) -> Any:
    """One real step: forward, backward, reduction, update."""
    groups = optimizers.groups
    optimizers.zero_grad()
    loss = forward(model, groups.data_rank, groups.layout.data, step)
    loss.backward()
    finalize_grads(optimizers.roles, groups)
    return optimizers.step(loss)


@torch.no_grad()
def drawn_step(optimizers: RoleOptimizers, step: int) -> Any:
    """A step with gradients drawn by parameter name, equal in every layout; works on pipeline stages."""
    optimizers.zero_grad()
    for role, module in optimizers.modules.items():
        for entry in saving.weight_tensors(module, f"{role}.", optimizers.groups).values():
            axes = entry.prepend_axis_num
            layer = entry.global_offset[0] if axes else 0
            seed = zlib.crc32(f"{entry.key}.{layer}.{step}".encode())
            whole = torch.randn(entry.global_shape[axes:], generator=torch.Generator().manual_seed(seed))
            for dim, start in enumerate(entry.global_offset[axes:]):
                whole = whole.narrow(dim, start, entry.local_shape[dim])
            entry.data.main_grad.copy_(whole)
    for role in optimizers.roles.values():
        role.finish_grad_sync()
    return optimizers.step()


def snapshot(optimizers: RoleOptimizers) -> list[tuple]:
    """This rank's shards of weights, master weights, moments and EMA."""
    out = []
    for role, module in optimizers.modules.items():
        weights = saving.weight_tensors(module, f"{role}.", optimizers.groups)
        state = optimizers.optimizers[role].sharded_tensors(weights, loading=False)
        entries = [*weights.values(), *(e for entry in state.values() for e in entry.values())]
        for e in entries:
            axes = e.prepend_axis_num
            place = (e.global_offset[0] if axes else None, e.global_offset[axes:])
            out.append((e.key, e.global_shape[axes:], place, e.data.detach().cpu().clone()))
    return out


def assemble(ranks: list[list[tuple]]) -> dict[tuple, torch.Tensor]:
    """Whole tensors by (key, layer) from every rank's snapshot; fails where shards leave a hole."""
    whole: dict[tuple, torch.Tensor] = {}
    for shards in ranks:
        for key, shape, (layer, offset), data in shards:
            target = whole.setdefault((key, layer), torch.full(shape, float("nan"), dtype=data.dtype))
            for dim, start in enumerate(offset):
                target = target.narrow(dim, start, data.shape[dim])
            target.copy_(data)
    holes = [key for key, tensor in whole.items() if tensor.isnan().any()]
    assert not holes, f"not covered: {holes}"
    return whole


def largest_difference(a: dict[tuple, torch.Tensor], b: dict[tuple, torch.Tensor]) -> float:
    """Of two whole states, relative to each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-6)).item() for k in a)
