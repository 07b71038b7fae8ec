"""Trains a sweep of probes side by side on one pass of features (Table 10), and judges them.

Every learning rate and weight decay, for every label of the data set, is a member; all start from the same
weights and see the same batches. AdamW, cosine to zero. Nothing is drawn from a state: the order of an
epoch is a function of (seed, epoch), so the whole state is the members, their optimizer and a step number,
and a resumed run computes what the unbroken one would. Ranks take parts of each batch and add gradients.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.evaluation import probe
from nextvid_mcore.evaluation.datasets import PLAIN, VIEWS, Request
from nextvid_mcore.evaluation.features import Rows, Source, chunks
from nextvid_mcore.evaluation.presets import ProbeConfig
from nextvid_mcore.evaluation.ranks import Ranks
from nextvid_mcore.rng import numpy_rng, torch_generator


@dataclass
class Member:
    """One probe of the sweep."""

    task: int  # column of the labels
    lr: float
    weight_decay: float
    module: nn.Module


@dataclass(frozen=True)
class Judged:
    """One member's counts on some items."""

    correct: int
    items: int
    unreadable: int  # among items; they count as wrong
    loss: float  # mean over the readable ones

    @property
    def top1(self) -> float:
        return 100 * self.correct / max(1, self.items)


def split(items: int, config: ProbeConfig, paths: np.ndarray | None = None) -> tuple[list[int], list[int]]:
    """(items to train on, items to judge the sweep on), both rising; a function of the seed.

    paths: the items' files. One that is listed several times is on one side with all its lines.
    """
    held = max(1, round(items * config.holdout))
    require(items > held, f"{items} training items are too few to hold {held} of them out")
    order = numpy_rng(config.seed, "probe", 0).permutation(items)
    kept, judged = np.sort(order[held:]), np.sort(order[:held])
    if paths is not None and (both := np.isin(paths[kept], paths[judged])).any():
        kept, judged = kept[~both], np.sort(np.concatenate([judged, kept[both]]))
        require(len(kept) > 0, "the training list names one file again and again; give others")
    return kept.tolist(), judged.tolist()


def reading(config: ProbeConfig) -> int:
    """How items are read that are judged."""
    return VIEWS if config.views > 1 else PLAIN


class Sweep:
    """The members and their optimizer."""

    def __init__(self, config: ProbeConfig, tasks: dict[str, int], width: int, ranks: Ranks) -> None:
        self.config, self.ranks, self.tasks = config, ranks, tasks
        self.members: list[Member] = []
        for task, classes in enumerate(tasks.values()):
            for lr in config.lrs:
                for weight_decay in config.weight_decays:
                    if config.method == "linear":
                        module: nn.Module = probe.LinearProbe(width, classes)
                    else:
                        module = probe.AttentiveProbe(width, classes, config.heads, config.mlp)
                    module.initialise(torch_generator(config.seed, "init", task))
                    self.members.append(Member(task, lr, weight_decay, module.to(ranks.device)))
        groups = []
        for number, member in enumerate(self.members):
            for decayed in (True, False):  # none on biases, norms and the query
                params = [p for p in member.module.parameters() if (p.dim() > 1) == decayed]
                if params:
                    decay = member.weight_decay if decayed else 0.0
                    groups.append({"params": params, "weight_decay": decay, "member": number})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=True)
        self.parameters = [p for group in groups for p in group["params"]]
        self.modules = [member.module for member in self.members]

    def step(
        self, rows: Iterator, parts: int, items: int, share: float, stop: bool
    ) -> tuple[list[float], bool]:
        """One optimizer step from this rank's `parts` of a batch of `items`; `share`: of the schedule done.

        Returns every member's mean loss, and whether any rank wants to stop: that travels with the gradients.
        """
        losses = torch.zeros(len(self.members), device=self.ranks.device)
        self.optimizer.zero_grad(set_to_none=False)
        for _ in range(parts):
            part = next(rows)
            if not bool(part.good.any()):
                continue
            total = 0.0
            outputs = probe.run(self.modules, part.features[part.good][:, 0])
            for number, (member, logits) in enumerate(zip(self.members, outputs, strict=True)):
                wanted = part.label[part.good, member.task]
                loss = F.cross_entropy(logits, wanted, reduction="sum") / items
                losses[number] += loss.detach()
                total = total + loss
            total.backward()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks.size > 1:
            flag = torch.tensor([float(stop)], device=self.ranks.device)
            flat = torch.cat([*(p.grad.flatten() for p in self.parameters), losses, flag])
            self.ranks.sum(flat)
            sizes = [p.numel() for p in self.parameters]
            *grads, losses, flag = flat.split([*sizes, len(losses), 1])
            for parameter, grad in zip(self.parameters, grads, strict=True):
                parameter.grad.copy_(grad.view_as(parameter))
            stop = bool(flag.item() > 0)
        for group in self.optimizer.param_groups:
            lr = self.members[group["member"]].lr
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * share))
        self.optimizer.step()
        return losses.tolist(), stop

    def state(self) -> dict[str, Any]:
        return {
            "members": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        for module, values in zip(self.modules, state["members"], strict=True):
            module.load_state_dict(values)
        self.optimizer.load_state_dict(state["optimizer"])


# Training ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, items: int) -> np.ndarray:
    """The order of an epoch's training items."""
    return numpy_rng(seed, "probe", 1, epoch).permutation(items)


@dataclass(frozen=True)
class Plan:
    """Which items are in which step, the same for any number of ranks."""

    config: ProbeConfig
    items: list[int]
    chunk: int  # items whose features are held at a time
    ranks: Ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.items) // self.config.batch)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    def batch(self, step: int) -> tuple[int, list[int]]:
        """(copy, items) of a step; the last of an epoch may be smaller."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.config.seed, epoch, len(self.items))
        first = number * self.config.batch
        chosen = [self.items[i] for i in order[first : first + self.config.batch].tolist()]
        return (epoch % self.config.copies if self.config.augmented else PLAIN), chosen

    def requests(self, step: int) -> list[Request]:
        """What this rank reads in a step."""
        copy, chosen = self.batch(step)
        return [Request(copy, part) for part in chunks(self.ranks.share(chosen), self.chunk)]


def train(
    sweep: Sweep,
    source: Source,
    plan: Plan,
    path: Path | None = None,
    settings: dict[str, Any] | None = None,
    save_every: int = 200,
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[int, Sequence[float]], None] = lambda *_: None,
) -> bool:
    """Train from the state in `path`, if there is one, to the end. False: stopped earlier, state saved."""
    step = load_state(path, sweep, settings or {}) if path else 0
    end = plan.steps if stop_after is None else min(plan.steps, stop_after)
    report(step, ())
    rows = source.stream(request for number in range(step, end) for request in plan.requests(number))
    halted = False
    try:
        while step < end and not halted:
            parts = -(-len(plan.ranks.share(plan.batch(step)[1])) // plan.chunk)
            items, share = len(plan.batch(step)[1]), step / plan.steps
            losses, halted = sweep.step(rows, parts, items, share, should_stop())
            if plan.ranks.size == 1:
                halted = should_stop()
            step += 1
            report(step, losses)
            if path and (step % save_every == 0 or step == end or halted):
                save_state(path, sweep, settings or {}, step)
    finally:
        if hasattr(rows, "close"):
            rows.close()  # ends the loader's workers
    return step == plan.steps


def save_state(path: Path, sweep: Sweep, settings: dict[str, Any], step: int) -> None:
    """The first rank writes; the file is whole or the old one."""
    if sweep.ranks.first:
        temporary = path.with_name(path.name + ".new")
        try:
            with open(temporary, "wb") as file:
                torch.save({"step": step, "settings": settings, **sweep.state()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer has an error of its own for a full disk
            reason, free = str(error).splitlines()[0], shutil.disk_usage(path.parent).free / 1e6
            temporary.unlink(missing_ok=True)
            raise ConfigError(
                f"step {step} could not be saved to {path} ({reason}; {free:.0f} MB were "
                "free): make room, the same command goes on from the last state saved"
            ) from None
    sweep.ranks.barrier()


def load_state(path: Path, sweep: Sweep, settings: dict[str, Any]) -> int:
    """The finished steps of the state in `path`, which is loaded; 0 where there is none."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=sweep.ranks.device, weights_only=True)
    except Exception as error:  # an unpickler raises anything on a torn file
        raise ConfigError(f"{path} cannot be read ({error!r:.80}); delete it to start again") from None
    check_same(state["settings"], settings, path)
    sweep.load(state)
    return state["step"]


def check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """A folder belongs to one probe: other settings need another folder."""
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    require(
        not changed,
        f"{path} is of another probe ({'; '.join(changed[:4])}); give another --out, or the same settings",
    )


# Judging -----------------------------------------------------------------------------------------


@torch.no_grad()
def judge(
    members: Sequence[Member],
    source: Source,
    items: Sequence[int],
    copy: int,
    chunk: int,
    ranks: Ranks,
    bar: Callable[..., Iterable[Rows]] = lambda iterable, **_: iterable,
) -> list[Judged]:
    """Every member's accuracy on `items`; probabilities are averaged over views. bar: tqdm's form."""
    device = ranks.device
    double = torch.float64 if device.type != "mps" else torch.float32
    counts = torch.zeros(len(members), 2, dtype=double, device=device)  # correct, loss
    read = torch.zeros(1, dtype=double, device=device)
    requests = [Request(copy, part) for part in chunks(ranks.share(list(items)), chunk)]
    for rows in bar(iterable=source.stream(requests), total=len(requests)):
        if not bool(rows.good.any()):
            continue
        features = rows.features[rows.good]
        read += len(features)
        outputs = probe.run([member.module for member in members], features.flatten(0, 1))
        for number, (member, logits) in enumerate(zip(members, outputs, strict=True)):
            chance = logits.float().softmax(-1).unflatten(0, features.shape[:2]).mean(1)  # [B, classes]
            wanted = rows.label[rows.good, member.task]
            guess = torch.where(chance.isfinite().all(1), chance.argmax(1), -1)  # a member that blew up
            counts[number, 0] += (guess == wanted).sum()
            counts[number, 1] -= chance.gather(1, wanted[:, None]).clamp_min(1e-12).log().double().sum()
    ranks.sum(counts)
    ranks.sum(read)
    good = int(read.item())
    return [
        Judged(int(correct), len(items), len(items) - good, loss / max(1, good))
        for correct, loss in counts.tolist()
    ]


def best(judged: Sequence[Judged]) -> int:
    """The member with the most right, of those the lowest loss."""

    def order(number: int) -> tuple[float, float]:
        loss = judged[number].loss
        return judged[number].correct, -loss if math.isfinite(loss) else -math.inf

    return max(range(len(judged)), key=order)
