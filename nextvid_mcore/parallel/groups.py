"""Layouts and process groups: how many ranks share a tensor, a stack of layers, a batch.

A `Layout` is checked against the run before any process starts; `build_groups` turns it into a
`HyperCommGrid` and the `ProcessGroupCollection` that every module, DDP, the optimizer, 1F1B and
checkpointing are handed. Nothing here sets a global group (`initialize_model_parallel` is never called),
so several layouts can live in one run. Rank order, fastest first: tensor, data, pipeline.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from nextvid_mcore.config import ConfigError, RunConfig, TransformerShape, require
from nextvid_mcore.parallel import cpu

_DIMS = ["tp", "cp", "dp", "pp"]


@dataclass(frozen=True)
class Layout:
    """Ranks of one role: `tensor` x `data` x `pipeline`; `sequence` splits sequences over `tensor`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data"):
            require(getattr(self, name) >= 1, f"parallel {name} must be 1 or more, got {getattr(self, name)}")

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def micro_batches(self, batch: int, micro_batch: int) -> int:
        """Forward passes of one replica in a step over `batch` clips."""
        per_pass = micro_batch * self.data
        require(
            batch % per_pass == 0,
            f"global batch {batch} is not divisible by micro batch {micro_batch} x data parallel "
            f"{self.data} = {per_pass}; change one of the three",
        )
        return batch // per_pass


def _divisors(*numbers: int) -> str:
    limit = min(min(numbers), 64)
    return ", ".join(str(d) for d in range(1, limit + 1) if all(n % d == 0 for n in numbers))


def _check_tensor(role: str, shape: TransformerShape, tensor: int) -> None:
    legal = _divisors(shape.heads, shape.mlp)
    require(
        shape.heads % tensor == 0,
        f"{role}: {shape.heads} heads can't be split over tensor parallel {tensor}; it can be {legal}",
    )
    require(
        shape.mlp % tensor == 0,
        f"{role}: MLP width {shape.mlp} can't be split over tensor parallel {tensor}; it can be {legal}",
    )


def sequences(config: RunConfig, frames: int) -> dict[str, int]:
    """Tokens of every sequence a clip of `frames` video frames makes, in the static mask modes.

    Student and predictor have all masks as one sequence, without the last token frame's context; a joint
    predictor's holds the context too. What follows the predictor goes frame by frame.
    """
    t, n = config.model.token_frames(frames), config.model.tokens_per_frame
    student = (t - 1) * sum(config.mask.counts(n))
    queries = config.mask.masks * (t - 1) * n
    lengths = {
        "student": student,
        "predictor": queries + (student if config.model.context == "joint" else 0),
        "decoder" if config.model.generate else "alignment": n,
    }
    return lengths | ({"reference": t * n} if config.model.align else {})


_SEQUENCES = {  # the sequences that a role's layers hold
    "student": ("student",),
    "reference": ("reference",),
    "predictor": ("predictor", "alignment"),
    "decoder": ("decoder",),
}
EVERY_ROLE = tuple(_SEQUENCES)


def check_layout(config: RunConfig, layout: Layout, roles: Sequence[str] = EVERY_ROLE) -> None:
    """Raise ConfigError if `roles` (of student, reference, predictor, decoder) can't be split as `layout`."""
    shapes = {"student": "encoder", "reference": "encoder", "predictor": "predictor", "decoder": "decoder"}
    for role in roles:
        if role != "decoder" or config.model.generate:
            _check_tensor(shapes[role], getattr(config.model, shapes[role]), layout.tensor)
    require(
        layout.pipeline <= config.model.encoder.depth,
        f"{config.model.encoder.depth} encoder layers can't be split over {layout.pipeline} pipeline stages",
    )
    if not config.mask.static:
        require(
            layout.pipeline == 1 and not layout.sequence,
            f"mask mode {config.mask.mode} makes sequences of changing length, which need pipeline 1 and no "
            f"sequence parallelism; got pipeline {layout.pipeline}, sequence {layout.sequence}: use mode "
            "fixed",
        )
    if not layout.sequence:
        return
    held = {name for role in roles for name in _SEQUENCES[role]}
    for stage in config.stages:
        for name, length in sequences(config, stage.frames).items():
            require(
                name not in held or length % layout.tensor == 0,
                f"stage {stage.name}: the {name}'s sequence of {length} tokens can't be split over "
                f"tensor parallel {layout.tensor}; turn sequence parallelism off or choose tensor from "
                f"{_divisors(length, config.model.encoder.heads)}",
            )


def resolve_layout(config: RunConfig, world_size: int, roles: Sequence[str] = EVERY_ROLE) -> Layout:
    """The encoder's layout on `world_size` ranks, or a ConfigError with the numbers and the way out.

    roles: what sits there beside it.
    """
    wanted = config.parallel.encoder
    tensor, pipeline = wanted.tensor or 1, wanted.pipeline or 1
    check_layout(config, Layout(tensor, pipeline), roles)  # before its product with the ranks
    model = tensor * pipeline
    require(
        world_size % model == 0,
        f"{world_size} ranks can't be divided into groups of tensor {tensor} x pipeline {pipeline} = "
        f"{model}; start a multiple of {model} ranks",
    )
    data = world_size // model
    require(
        wanted.data in (None, data),
        f"tensor {tensor} x pipeline {pipeline} x data {wanted.data} needs "
        f"{model * (wanted.data or 1)} ranks, but {world_size} were started; leave data out to derive it",
    )
    layout = Layout(tensor, pipeline, data, sequence=config.parallel.sequence and tensor > 1)
    check_layout(config, layout, roles)
    for stage in config.stages:
        batch, micro = config.batch(stage), config.given_micro_batch(stage)
        if micro is None:
            every = math.gcd(*(config.batch(each) for each in config.stages))
            most = max(n for n in range(1, data + 1) if every % n == 0)
            require(
                batch % data == 0,
                f"stage {stage.name}: global batch {batch} can't be shared equally by data parallel {data}; "
                f"use data parallel {most} ({most * model} rank{'s' if most * model > 1 else ''}), the most "
                "below that every stage's batch admits, or another batch",
            )
            continue
        try:
            layout.micro_batches(batch, micro)
        except ConfigError as error:
            flag = config.micro_batch_flag(stage)
            raise ConfigError(f"stage {stage.name}: {error}, such as {flag}") from None
    return layout


@dataclass(frozen=True)
class RoleGroups:
    """The process groups of one seat, as seen from this rank; ranks outside it have no collection."""

    layout: Layout
    grid: HyperCommGrid
    collection: ProcessGroupCollection | None

    @property
    def tensor_rank(self) -> int:
        return self.collection.tp.rank()

    @property
    def data_rank(self) -> int:
        return self.collection.dp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.collection.pp.rank()

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1


def build_groups(layout: Layout, rank_offset: int = 0, timeout: float = 600.0) -> RoleGroups:
    """Create the groups of `layout` on ranks `rank_offset ...`. Every rank of the world must call it.

    Args:
        timeout: seconds a collective of these groups may hang before it fails.
    """
    world = dist.get_world_size()
    require(
        rank_offset + layout.size <= world,
        f"tensor {layout.tensor} x data {layout.data} x pipeline {layout.pipeline} from rank {rank_offset} "
        f"on needs {rank_offset + layout.size} ranks, but {world} were started",
    )
    grid = HyperCommGrid([layout.tensor, 1, layout.data, layout.pipeline], _DIMS, rank_offset=rank_offset)
    limit = datetime.timedelta(seconds=timeout)

    def group(*dims: str) -> dist.ProcessGroup:
        return grid.create_pg(list(dims), timeout=limit)

    tp, cp, dp, pp = (group(dim) for dim in _DIMS)
    mp, tp_dp, everyone = group("tp", "pp"), group("tp", "dp"), group(*_DIMS)
    if not rank_offset <= dist.get_rank() < rank_offset + layout.size:
        return RoleGroups(layout, grid, None)
    collection = ProcessGroupCollection(
        tp=tp, pp=pp, mp=mp, dp=dp, embd=None, pos_embd=None,
        # No context parallelism: cp is this rank alone, and groups "with cp" are those without.
        cp=cp, tp_cp=tp, dp_cp=dp, intra_dp_cp=dp, dp_cp_gtp_remat=dp, tp_dp_cp=tp_dp,
        intra_dist_opt=everyone, inter_dist_opt=None,
        # No experts and no weight rematerialisation: megatron-core wants the names.
        ep=cp, expt_tp=cp, tp_ep=tp, tp_ep_pp=mp, expt_dp=dp, intra_expt_dp=dp, expt_dp_gtp_remat=dp,
        gtp_remat=None, expt_gtp_remat=None,
    )  # fmt: skip
    return RoleGroups(layout, grid, collection)


def init_distributed(timeout: float = 600.0) -> None:
    """Join the world that torchrun describes, or be a world of one. NCCL with CUDA, else gloo."""
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        # recorded collectives would keep addresses that such segments take back
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout), **alone
        )
    cpu.install()
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def seed_trackers(seed: int, groups: RoleGroups) -> None:
    """Seed torch, and megatron-core's RNG trackers: equal over data ranks, different over tensor ranks."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=groups.tensor_rank, ep_rank=0, etp_rank=0, force_reset_rng=True
    )
