"""Table, comparison, spikes and picture of what fp8_convergence.py found; needs no GPU.

What is compared is the mean of a run's last 50 losses. `within`: whether a recipe's mean over seeds lies in
the range of bf16's seeds. Three values span so little that the mean of three others from one normal
distribution lies outside in 37 cases of 100, so how often it lies within is counted over all triples of
seeds too. The paired difference, minus bf16 of the same seed, has a standard error and a 95% interval of
Student's t. `plain`, bf16 of uncompiled kernels, shows what rounding alone does to it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST = 50  # losses that are averaged
TRIPLE = 3
SPIKE, ROUND = (
    1.5,
    5,
)  # a loss so many times the median of so many on either side; none in a run's first tenth
SAME = 1e-4  # nextvid_mcore/training/monitors.py: Constant
NEAR = 0.02  # of a pass made again: FP8 with delayed scales comes so near, others give every digit
# Student's t that 95% lie within, for 1, 2, ... degrees of freedom
T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
COLOURS = {
    "bf16": "#777777",
    "plain": "#c49c00",
    "delayed": "#d62728",
    "current": "#1f77b4",
    "blockwise": "#2ca02c",
    "mxfp8": "#9467bd",
}
Runs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A recipe against bf16. difference, error: of the pairs of one seed; half: of the 95% interval."""

    recipe: str
    mean: float
    low: float
    high: float
    seeds: int
    bf16_seeds: int
    pairs: int
    difference: float
    error: float
    half: float
    triples: int
    triples_within: int

    @property
    def within(self) -> bool:
        return self.low <= self.mean <= self.high

    def __str__(self) -> str:
        text = (
            f"VERDICT {self.recipe}: {self.mean:.5f} over {self.seeds} seed{'s' * (self.seeds > 1)} lies "
            f"{'WITHIN' if self.within else 'OUTSIDE'} bf16's {self.low:.5f} to {self.high:.5f} "
            f"({self.bf16_seeds} seeds)"
        )
        if self.triples > 1:
            text += f"; in {self.triples_within} of {self.triples} triples of seeds (63% expected of equals)"
        if self.pairs > 1:
            text += (
                f"; minus bf16 {self.difference:+.5f}, standard error {self.error:.5f}, 95% interval "
                f"{self.difference - self.half:+.5f} to {self.difference + self.half:+.5f}"
            )
        return text


def complete(found: Runs) -> dict[str, Mapping[str, Any]]:
    """Runs that came to their end."""
    return {run: line for run, line in found.items() if len(line.get("losses", ())) == line.get("steps")}


def by_recipe(
    runs: Runs, of: Callable[[Sequence[float]], float] = statistics.fmean, what: str = "losses"
) -> dict[str, dict[int, float]]:
    """recipe -> seed -> mean (or what `of` makes) of the last of `what`, where it is; without second runs."""
    out: dict[str, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: (list(COLOURS).index(run.split(":")[0]), run)):
        recipe, seed, *again = run.split(":")
        if not again and what in runs[run]:
            out.setdefault(recipe, {})[int(seed)] = of(runs[run][what][-LAST:])
    return out


def compare(recipe: str, values: Mapping[int, float], bf16: Mapping[int, float]) -> Comparison:
    """values and bf16: by seed; two or more of bf16."""
    shared = [seed for seed in values if seed in bf16]
    apart = [values[seed] - bf16[seed] for seed in shared]
    error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
    triples = list(itertools.combinations(shared, TRIPLE))
    inside = 0
    for triple in triples:
        theirs = [bf16[seed] for seed in triple]
        inside += min(theirs) <= statistics.fmean(values[seed] for seed in triple) <= max(theirs)
    return Comparison(
        recipe=recipe,
        mean=statistics.fmean(values.values()),
        low=min(bf16.values()),
        high=max(bf16.values()),
        seeds=len(values),
        bf16_seeds=len(bf16),
        pairs=len(apart),
        difference=statistics.fmean(apart) if apart else float("nan"),
        error=error,
        half=T95[min(len(apart) - 2, len(T95) - 1)] * error if len(apart) > 1 else float("nan"),
        triples=len(triples),
        triples_within=inside,
    )


def spikes(runs: Runs) -> list[str]:
    """Losses far above their neighbours."""
    out = []
    for run, line in runs.items():
        losses = line["losses"]
        for i in range(len(losses) // 10, len(losses)):
            near = losses[max(0, i - ROUND) : i] + losses[i + 1 : i + 1 + ROUND]
            usual = statistics.median(near)
            if losses[i] > SPIKE * usual:
                norm = line.get("norms")
                told = f", gradient's norm {norm[i]:.3g}, before it {norm[i - 1]:.3g}" if norm else ""
                parts = {name: line[name] for name in ("flow", "align") if name in line} | line.get(
                    "networks", {}
                )
                told += "".join(f"; {name} {x[i]:.3g}, before {x[i - 1]:.3g}" for name, x in parts.items())
                out.append(f"{run}: loss {losses[i]:.4f} at step {i}, round it {usual:.4f}{told}")
    return out


def alike(x: float, y: float) -> bool:
    """Whether two passes gave the same; what isn't finite in both is the same."""
    return math.isclose(x, y, rel_tol=NEAR) or not (math.isfinite(x) or math.isfinite(y))


def jump(each: Mapping[str, Any]) -> str:
    """Where a loss that stood out came from, as watched_step.py found it."""

    def terms(numbers: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {numbers[name]:.3g}" for name in ("flow", "align") if name in numbers)

    told = [terms(each["first"])]
    told += [f"with weights of before the update of {k}: {terms(x)}" for k, x in each["earlier"].items()]
    norm, name = each["largest"][0]
    changes = ", ".join(f"{role} {largest:.3g}" for role, (largest, _) in each["moved"].items())
    told += [f"largest gradient {name} {norm:.3g}", f"largest change {changes}"]
    return "; ".join([*told, f"weights astray {sum(each['astray'].values())}"])


def made_again(runs: Runs) -> list[str]:
    """Passes that stood out: whether their second, from the same weights and samples, gave the same."""
    out, same = [], 0
    found = [(run, each) for run, line in runs.items() for each in line.get("again", ())]
    for run, each in found:
        pairs = {name: (x, each["second"][name]) for name, x in each["first"].items()}
        apart = {name: pair for name, pair in pairs.items() if not alike(*pair)}
        same += not apart
        if apart:
            told = ", ".join(f"{name} {x:.4g} then {y:.4g}" for name, (x, y) in apart.items())
            out.append(f"{run}: another pass at step {each['step']} gave other numbers: {told}")
        if "earlier" in each:
            out.append(f"{run}: at step {each['step']} {jump(each)}")
    if found:
        out.append(f"{len(found)} passes stood out and were made again: {same} gave the same numbers")
    return out


def repeats(runs: Runs) -> list[str]:
    """What a second run of the same seed did."""
    out = []
    for run in runs:
        recipe, seed, *again = run.split(":")
        first = runs.get(f"{recipe}:{seed}")
        if not again or first is None:
            continue
        pairs = list(zip(first["losses"], runs[run]["losses"], strict=True))
        other = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if other is None:
            out.append(f"{recipe}:{seed} twice: every loss the same")
            continue
        apart = statistics.fmean(y - x for x, y in pairs[-LAST:])
        out.append(f"{recipe}:{seed} twice: apart from step {other} on; last {LAST} by {apart:+.5f}")
    return out


def otherwise(runs: Runs) -> list[str]:
    """The same comparison of other numbers, and how alive the features were."""
    out = []
    for said, of, what in (
        ("by medians, which a spike leaves alone", statistics.median, "losses"),
        ("flow loss alone, whose target is the same in every run", statistics.fmean, "flow"),
    ):
        values = by_recipe(runs, of, what)
        bf16 = values.pop("bf16", {})
        if len(bf16) > 1:
            out += [f"{said}: {compare(recipe, each, bf16)}" for recipe, each in values.items()]
    for what, said in (("z_var", "predictions"), ("reference_var", "the reference's features")):
        found = [x for each in by_recipe(runs, what=what).values() for x in each.values()]
        if found:
            out.append(f"variance of {said} over tokens, last {LAST}: {min(found):.2g} to {max(found):.2g}")
    variances = [x for line in runs.values() for x in line.get("z_var", ())]
    if variances:
        share = sum(x < SAME for x in variances) / len(variances)
        out.append(f"predictions were one vector (variance below {SAME}) in {share:.0%} of the steps")
    return out


def summarise(found: Runs) -> tuple[list[str], list[Comparison]]:
    """Lines to print, and every recipe against bf16."""
    runs = complete(found)
    values = by_recipe(runs)
    bf16 = values.get("bf16", {})
    missing = [
        f"not finished: {run} ({line.get('error', 'cut off')})"
        for run, line in found.items()
        if run not in runs
    ]
    if len(bf16) < 2:
        return [*missing, f"no verdict: bf16 finished with {len(bf16)} seeds, two are needed"], []
    seeds = sorted({seed for each in values.values() for seed in each})
    lines = [
        f"| last {LAST} losses | {' | '.join(f'seed {s}' for s in seeds)} | mean | sd | s a run |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for recipe, each in values.items():
        cells = [f"{each[s]:.4f}" if s in each else "" for s in seeds]
        spread = f"{statistics.stdev(each.values()):.4f}" if len(each) > 1 else ""
        took = statistics.fmean(runs[f"{recipe}:{s}"]["seconds"] for s in each)
        mean = statistics.fmean(each.values())
        lines.append(f"| {recipe} | {' | '.join(cells)} | {mean:.4f} | {spread} | {took:.1f} |")
    compared = [compare(recipe, each, bf16) for recipe, each in values.items() if recipe != "bf16"]
    places = ", ".join(sorted({line.get("gpu", "unknown") for line in runs.values()}))
    recorded = sum(line.get("recorded", False) for line in runs.values())
    skipped = sum(line.get("skipped", 0) for line in runs.values())
    lines += ["", f"{places}: {len(runs)} runs, {recorded} of them recorded; {skipped} steps skipped"]
    lines += [*repeats(runs), *(spikes(runs) or [f"no loss {SPIKE} times its neighbours"])]
    lines += [*made_again(runs), *missing]
    lines += [str(each) for each in compared]
    lines += otherwise(runs)
    return lines, compared


def plot(found: Runs, compared: list[Comparison], path: Path) -> None:
    """Losses, their ends enlarged, the means of these by seed, and their differences from bf16's."""
    import numpy as np
    from matplotlib.figure import Figure

    runs = complete(found)
    values = by_recipe(runs)
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    whole, end, means, apart = figure.subplots(1, 4, width_ratios=(1.1, 1.1, 1, 1))
    steps, tails = max(line["steps"] for line in runs.values()), []
    smooth = max(1, min(10, steps // 10))
    for recipe, seeds in values.items():
        curves = np.array([runs[f"{recipe}:{seed}"]["losses"] for seed in seeds])
        curves = np.apply_along_axis(np.convolve, 1, curves, np.ones(smooth) / smooth, "valid")
        x = np.arange(smooth, curves.shape[1] + smooth)
        tails.append(np.median(curves[:, 2 * steps // 3 :], 0))
        for axes in (whole, end):
            axes.plot(x, curves.T, color=COLOURS[recipe], lw=0.5, alpha=0.25)
            axes.plot(x, np.median(curves, 0), color=COLOURS[recipe], lw=1.5, label=recipe)
    for at, (recipe, seeds) in enumerate(values.items()):
        x = at + np.linspace(-0.25, 0.25, len(seeds)) * (len(seeds) > 1)
        means.plot(x, list(seeds.values()), "o", ms=4, color=COLOURS[recipe])
        means.plot([at - 0.35, at + 0.35], [np.mean(list(seeds.values()))] * 2, color=COLOURS[recipe], lw=2)
        pairs = [value - values["bf16"][seed] for seed, value in seeds.items() if seed in values["bf16"]]
        if recipe != "bf16" and pairs:
            x = at + np.linspace(-0.25, 0.25, len(pairs)) * (len(pairs) > 1)
            apart.plot(x, pairs, "o", ms=3, alpha=0.5, color=COLOURS[recipe])
    bf16 = values["bf16"].values()
    means.axhspan(min(bf16), max(bf16), color=COLOURS["bf16"], alpha=0.2, lw=0)
    names = list(values)
    for each in compared:
        half = each.half if each.pairs > 1 else None
        apart.errorbar(
            names.index(each.recipe), each.difference, half, fmt="s", ms=5, capsize=5, lw=2,
            color=COLOURS[each.recipe],
        )  # fmt: skip
    spread = statistics.stdev(bf16)
    apart.axhspan(-spread, spread, color=COLOURS["bf16"], alpha=0.2, lw=0)
    apart.axhline(0, color=COLOURS["bf16"], lw=1)
    most = 1.3 * max((abs(each.difference) + 2 * spread for each in compared), default=spread)
    apart.set_ylim(-most, most)  # an interval of three seeds can be as wide as all else
    whole.set(xlabel="step", ylabel=f"loss (mean of {smooth})")
    whole.legend(frameon=False, fontsize=8)
    whole.set_title("thick: median over seeds", fontsize=9)
    low, high = np.min(tails), np.max(tails)
    end.set(xlabel="step", xlim=(2 * steps // 3, steps), ylim=(low - 0.02, high + 0.04))
    end.set_title(f"the last {steps - 2 * steps // 3} steps", fontsize=9)
    means.set(xlim=(-0.5, len(names) - 0.5), xticks=range(len(names)))
    means.set_title(
        f"mean of the last {LAST} losses: dots seeds,\nbars their means, grey bf16's range", fontsize=9
    )
    apart.set(xlim=(0.5, len(names) - 0.5), xticks=range(1, len(names)))
    apart.set_title("minus bf16 of the same seed, 95% of\ntheir mean; grey bf16's deviation", fontsize=9)
    means.set_xticklabels(names, rotation=30)
    apart.set_xticklabels(names[1:], rotation=30)
    for axes in (whole, end, means, apart):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
