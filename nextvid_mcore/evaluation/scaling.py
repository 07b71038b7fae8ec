"""Scaling laws: how a held-out loss falls with the encoder's size and the clips it has seen.

The law is that of Hoffmann et al. 2022 ("Training compute-optimal large language models", approach 3),

    L(N, D) = E + A / N^alpha + B / D^beta,

with N parameters of the encoder and D clips, fitted to the ends of runs by a robust least squares of log L.
Only ends of whole schedules count: before its cool-down a run's loss says little of what it has learnt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

from nextvid_mcore import flops
from nextvid_mcore.config import RunConfig, is_made
from nextvid_mcore.schedule import Schedule

HUBER = 1e-3  # of log L: from where a residual counts by its size and not by its square
STEEPEST = 3.0  # exponents that are looked for end here
LEAST_RUNS, LEAST_KINDS = 6, 3  # for five numbers; different sizes, and different numbers of clips
VALUES = ("loss_flow", "loss_align", "loss")  # of eval.jsonl


@dataclass(frozen=True)
class End:
    """Where a run ended. left_out: why it doesn't count, or None."""

    name: str
    parameters: int  # N, of the encoder
    clips: int  # D, seen in training
    flops: float  # C, of training by formula, without the frozen target's
    loss: float  # held out, of the EMA encoder
    left_out: str | None = None


def end(name: str, config: RunConfig, rows: Sequence[dict[str, Any]], value: str) -> End:
    """Of a run with the rows of its eval.jsonl; `value` is one of VALUES."""
    schedule, step = Schedule(config), rows[-1]["step"] if rows else 0
    found = rows[-1]["ema"].get(value) if rows else None
    left_out = None
    if not rows:
        left_out = "no held-out loss: give the run an eval manifest and --eval.every"
    elif step < schedule.schedule_steps:
        left_out = f"its last held-out loss is of step {step} of {schedule.schedule_steps}"
    elif found is None:
        left_out = f"its {value} is not a number, or switched off"
    channels = flops.target_channels(config) if config.model.generate else 0
    return End(
        name=name,
        parameters=flops.parameters(config.model, channels).encoder,
        clips=schedule.samples_before(step),
        flops=training_flops(config, step),
        loss=math.nan if found is None else found,
        left_out=left_out,
    )


def training_flops(config: RunConfig, steps: int) -> float:
    """FLOPs of the first `steps` steps of the schedule, as they are executed."""
    total = 0.0
    for stage in config.stages:
        taken = min(stage.steps, steps)
        total += taken * config.batch(stage) * flops.clip_flops(config, stage, executed=True).total
        steps -= taken
    return total


def measured_by(config: RunConfig, value: str) -> dict[str, Any]:
    """What the held-out `value` is a loss of, by setting: runs that differ in it can't be compared."""
    data, loss = config.data, config.loss
    model = {key: getattr(config.model, key) for key in ("image_size", "patch_size", "tubelet_size")}
    target = {key: getattr(config.target, key) for key in ("kind", "checkpoint", "statistics", "pixel_scale")}
    mask = dataclasses.asdict(config.mask)
    evaluated = {key: getattr(config.eval, key) for key in ("samples", "tau_bins")}
    return {
        **{f"model.{key}": x for key, x in model.items()},
        **{f"target.{key}": x for key, x in target.items()},
        **{f"mask.{key}": x for key, x in mask.items()},
        **{f"eval.{key}": x for key, x in evaluated.items()},
        "data.eval_manifest": data.eval_manifest,
        "data.sets": [f"{each.name}={each.weight:g}" for each in data.sets],  # in what shares clips are drawn
        "data.fps": data.fps,
        # made clips that are held out are as large as the training's
        "data.manifest": data.manifest if data.eval_manifest and is_made(data.eval_manifest) else None,
        "stages.0.frames": config.stages[0].frames,
    } | ({"loss.flow": loss.flow, "loss.align": loss.align} if value == "loss" else {})


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: Any, clips: Any) -> Any:
        return self.E + self.A * parameters**-self.alpha + self.B * clips**-self.beta


def lacking(ends: Sequence[End]) -> str | None:
    """Why no law can be fitted to these, or None."""
    kinds = {"sizes": {e.parameters for e in ends}, "numbers of clips": {e.clips for e in ends}}
    if len(ends) < LEAST_RUNS:
        return f"{len(ends)} runs count, and a law of five numbers wants {LEAST_RUNS} or more"
    for name, found in kinds.items():
        if len(found) < LEAST_KINDS:
            return f"the runs have {len(found)} different {name}, and a law wants {LEAST_KINDS} or more"
    return None


def fit(ends: Sequence[End], near: Law | None = None) -> Law:
    """The best of several starts, or of one at a law that is near. `lacking(ends)` must be None."""
    N, D, loss = (np.array([getattr(e, key) for e in ends], float) for key in ("parameters", "clips", "loss"))
    # centred, as the five numbers then depend less on each other
    n_mean, d_mean = np.log(N).mean(), np.log(D).mean()
    n, d = np.log(N) - n_mean, np.log(D) - d_mean
    wanted, least = np.log(loss), math.log(loss.min())

    def off(x: np.ndarray) -> np.ndarray:
        e, a, alpha, b, beta = x
        return logsumexp(np.stack([np.full_like(n, e), a - alpha * n, b - beta * d]), axis=0) - wanted

    low = np.array([least - 12, least - 12, 0, least - 12, 0])
    high = np.array([least, least + 3, STEEPEST, least + 3, STEEPEST])
    grid = itertools.product((0.3, 0.8), (0.2, 0.6), (0.2, 0.6))
    starts = [[least + math.log(share), least - 2, alpha, least - 2, beta] for share, alpha, beta in grid]
    if near is not None:
        a, b = math.log(near.A) - near.alpha * n_mean, math.log(near.B) - near.beta * d_mean
        starts = [np.clip([math.log(near.E), a, near.alpha, b, near.beta], low + 1e-6, high - 1e-6)]
    tries = [
        least_squares(off, start, bounds=(low, high), loss="huber", f_scale=HUBER, max_nfev=500)
        for start in starts
    ]
    e, a, alpha, b, beta = min(tries, key=lambda each: each.cost).x
    found = (math.exp(e), math.exp(a + alpha * n_mean), alpha, math.exp(b + beta * d_mean), beta)
    return Law(*map(float, found))


def without_one(ends: Sequence[End], law: Law) -> list[Law]:
    """The laws without each run in turn, where one can still be fitted: how much hangs on a single run."""
    rests = [[e for e in ends if e is not left] for left in ends]
    return [fit(rest, law) for rest in rests if lacking(rest) is None]


@dataclass(frozen=True)
class Cost:
    """FLOPs of a clip by the encoder's size, `fixed + each * N`: predictor and decoder don't grow with it."""

    fixed: float
    each: float

    @classmethod
    def of(cls, ends: Sequence[End]) -> Cost:
        """The line through the runs', nearest in proportion."""
        N = np.array([e.parameters for e in ends], float)
        clip = np.array([e.flops / e.clips for e in ends])
        lines = np.stack([1 / clip, N / clip], 1)
        fixed, each = np.linalg.lstsq(lines, np.ones_like(N), rcond=None)[0]
        return cls(float(fixed), float(each))

    def clip(self, parameters: Any) -> Any:
        return self.fixed + self.each * parameters


@dataclass(frozen=True)
class Best:
    """What a budget buys by the law. edge: the best size lies at an end of the sizes that were tried."""

    flops: float
    parameters: float
    clips: float
    loss: float
    edge: bool


def best(law: Law, cost: Cost, budget: float, sizes: tuple[float, float]) -> Best:
    """Of encoders of sizes[0] to sizes[1] parameters, for `budget` FLOPs."""
    N = np.geomspace(*sizes, 4001)
    D = budget / np.maximum(cost.clip(N), 1.0)
    losses = law.loss(N, D)
    i = int(losses.argmin())
    return Best(budget, float(N[i]), float(D[i]), float(losses[i]), edge=i in (0, len(N) - 1))
