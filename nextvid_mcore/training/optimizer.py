"""One step of AdamW over all roles: Table 8's settings, one global norm, one decision to apply or skip.

A role (student, predictor, decoder) is wrapped in megatron-core's DistributedDataParallel and has its own
sharded AdamW; a rank has the roles that live on it. Learning rates are set before every step, since they
are a function of the step alone (nextvid_mcore/schedule.py).

With bf16 weights on CUDA one kernel makes the update (training/one_pass.py); megatron-core's optimizer, one
list of tensors after the other, is the reference, and what everything else runs on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import clip_grads
from torch import Tensor
from torch.nn import Module

from nextvid_mcore import switches
from nextvid_mcore.config import OptimConfig, require
from nextvid_mcore.models import fused
from nextvid_mcore.parallel.groups import RoleGroups
from nextvid_mcore.training.ahead import Report
from nextvid_mcore.training.ema import Ema
from nextvid_mcore.training.gradients import RoleDDP
from nextvid_mcore.training.shards import ShardedAdamW

if TYPE_CHECKING:
    from nextvid_mcore.training.one_pass import OnePass

STUDENT, DECODER = "student", "decoder"


class HasRoles(Protocol):
    """A model that names its trained parts on this rank."""

    def roles(self) -> dict[str, Module]: ...


class Rates(Protocol):
    """What the optimizer needs of a schedule's StagePoint."""

    @property
    def lr(self) -> float: ...
    @property
    def lr_flow(self) -> float: ...


Groups = RoleGroups | Mapping[str, RoleGroups]  # of all roles, or by role


def groups_of(groups: Groups, role: str) -> RoleGroups:
    """The groups that a role works in."""
    return groups if isinstance(groups, RoleGroups) else groups[role]


@dataclass(frozen=True)
class StepOutcome:
    """applied: False when the loss or a gradient was not finite anywhere; grad_norm: before clipping."""

    applied: bool
    grad_norm: float


def wrap_roles(
    model: HasRoles,
    groups: Groups,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    bucket_size: int | None = None,
) -> dict[str, RoleDDP]:
    """Wrap every role of this rank in megatron-core's DistributedDataParallel, gradients in fp32.

    Args:
        overlap_grad_reduce: reduce gradients bucket by bucket during the backward pass (CUDA).
        overlap_param_gather: gather weights bucket by bucket during the next forward pass (CUDA); not with
            compiled norms (models/fused.py), which read their weights without the modules' hooks.
        bucket_size: parameters of a bucket when reduction overlaps; None: megatron-core's choice.

    Raises:
        ConfigError: overlap_param_gather with compiled norms.
    """
    trained = [p for module in model.roles().values() for p in module.parameters() if p.requires_grad]
    require(
        not (overlap_param_gather and any(map(fused.compiles, trained))),
        "overlap_param_gather gathers weights in the modules' forward hooks, which compiled norms pass by; "
        "use --model.compile False with it",
    )
    wrapped = {}
    for name, module in model.roles().items():
        mine = groups_of(groups, name)
        size = bucket_size or max(40_000_000, 1_000_000 * mine.layout.data)
        if not overlap_grad_reduce or not mine.first_stage:
            size = None  # one bucket, as megatron-core does
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
            bucket_size=size,
            check_for_nan_in_grad=False,  # a non-finite step is skipped, by everyone together
        )
        params = [p for p in module.parameters() if p.requires_grad]
        wrapped[name] = RoleDDP(
            module.config,
            settings,
            module,
            pg_collection=mine.collection,
            full_param_layout=ShardedAdamW.compute_full_param_layout(
                params, size, mine.layout.data, settings
            ),
        )
    return wrapped


def finalize_grads(roles: Mapping[str, RoleDDP], groups: Groups) -> None:
    """Reduce gradients over data ranks, and those of replicated parameters over tensor ranks under SP."""
    for name, role in roles.items():
        finalize_model_grads([role], None, pg_collection=groups_of(groups, name).collection)


class RoleOptimizers:
    """The optimizers of all roles on this rank, and the student's EMA.

    Args:
        roles: from `wrap_roles`.
        groups: of all roles of this rank, or by role.
        reference: the frozen encoder of this rank, kept equal to the EMA; None: no one reads it here.
        send_reference: called after every update of it, where it is run on other ranks (reference_edge.py).
    """

    def __init__(
        self,
        roles: dict[str, RoleDDP],
        config: OptimConfig,
        groups: Groups,
        reference: Module | None = None,
        send_reference: Callable[[], None] | None = None,
    ) -> None:
        self.send_reference = send_reference
        self.roles, self.config, self.groups, self.reference = roles, config, groups, reference
        self.optimizers = {
            name: ShardedAdamW(role, config, groups_of(groups, name)) for name, role in roles.items()
        }
        self.ema = Ema(self.optimizers[STUDENT], config.ema) if STUDENT in self.optimizers else None
        self.updates = 0  # steps that were applied
        self.refresh()
        self.one_pass = self.in_one_pass() if switches.on("one_pass") and self._fits_one_pass() else None

    def _fits_one_pass(self) -> bool:
        """bf16 weights, and Triton's kernels in use: the same on all ranks that share a role."""
        trained = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        return bool(trained) and all(p.dtype == torch.bfloat16 and fused.compiles(p) for p in trained)

    def in_one_pass(self) -> OnePass:
        """These optimizers' update as one kernel."""
        from nextvid_mcore.training.one_pass import OnePass  # needs Triton

        return OnePass(self.optimizers, self.config, self.ema)

    def note(self) -> str:
        """For the log: what makes the update on this rank."""
        if self.one_pass is not None:
            return "update: AdamW, EMA and weights in one pass; the host does not wait for the norm"
        inner = {type(each.optimizer) for each in self.optimizers.values()}
        names = (f"{kind.__name__} of {kind.__module__.partition('.')[0]}" for kind in inner)
        return f"update: {', '.join(names)}, one list of tensors after the other"

    @property
    def modules(self) -> dict[str, Module]:
        """The roles' bare modules."""
        return {name: role.module for name, role in self.roles.items()}

    def set_lr(self, point: Rates) -> None:
        """Take the step's learning rates: the decoder follows `lr_flow`, all others `lr`."""
        for name, optimizer in self.optimizers.items():
            optimizer.set_lr(point.lr_flow if name == DECODER else point.lr)

    def zero_grad(self) -> None:
        """Forget the gradients; before the first micro-batch of every step."""
        for name, optimizer in self.optimizers.items():
            self.roles[name].zero_grad_buffer()
            optimizer.zero_grad()

    @torch.no_grad()
    def step(self, loss: Tensor | None = None, then: Callable[[], None] | None = None) -> StepOutcome:
        """Clip by the global norm and update, or change nothing. Gradients must be finalized.

        Every rank of the world must call it.

        Args:
            loss: this rank's loss, if it has one: a non-finite loss skips the step too.
            then: called when nothing here needs the gradients any more; in one pass that is before the host
                waits for the norm.
        """
        then = then or (lambda: None)
        if self.one_pass is not None:
            return self._step_in_one_pass(self.one_pass, loss, then)
        outcome = self._step_by_lists(loss)
        then()
        return outcome

    def _step_by_lists(self, loss: Tensor | None) -> StepOutcome:
        grads = []
        for optimizer in self.optimizers.values():
            optimizer.prepare_grads()
            grads += optimizer.get_grads_for_grad_norm()  # without the tensor ranks' duplicates
        if loss is not None:  # 0, or NaN if the loss isn't finite, which makes the norm NaN everywhere
            device = next(iter(self.roles.values())).buffers[0].grad_data.device
            grads.append(loss.detach().to(device, torch.float32).reshape(1) * 0)
        norm = float(clip_grads.get_grad_norm_fp32(grads))  # over the whole world
        if not math.isfinite(norm):
            return StepOutcome(False, norm)
        factor = self.config.clip / (norm + 1e-6)
        if factor < 1:
            for optimizer in self.optimizers.values():
                optimizer.scale_grads(factor)
        for optimizer in self.optimizers.values():
            optimizer.step_with_ready_grads()
        self.updates += 1
        if self.ema is not None:
            self.ema.update()
        self.refresh()
        return StepOutcome(True, norm)

    def _step_in_one_pass(
        self, update: OnePass, loss: Tensor | None, then: Callable[[], None]
    ) -> StepOutcome:
        """The host reads the norm once the device has the update, which has read it too."""
        norm = update.norm(loss)
        report = Report(norm)
        update.update(norm, self.updates + 1)
        if self.ema is not None and self.reference is not None:
            self.ema.gather()
        then()
        (seen,) = report.read()
        if not math.isfinite(seen):
            return StepOutcome(False, seen)
        self.updates += 1
        if self.send_reference is not None:
            self.send_reference()
        return StepOutcome(True, seen)

    def gather_weights(self) -> None:
        """Complete this rank's weights now, where they are otherwise gathered during the next forward."""
        for role in self.roles.values():
            if role.ddp_config.overlap_param_gather:
                role.disable_forward_pre_hook(param_sync=True)
                role.enable_forward_pre_hook()

    def refresh(self) -> None:
        """Write the EMA into the reference encoder."""
        if self.ema is not None and self.reference is not None:
            self.ema.refresh(self.reference)
        if self.send_reference is not None:
            self.send_reference()

    def set_updates(self, updates: int) -> None:
        """Continue after `updates` applied steps."""
        self.updates = updates
        for optimizer in self.optimizers.values():
            optimizer.set_updates(updates)

    def forget_moments(self) -> None:
        """Zero Adam's moments and its count of updates."""
        for optimizer in self.optimizers.values():
            for state in optimizer.optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        self.set_updates(0)
