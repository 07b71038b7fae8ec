"""The losses and monitors of runs, as the paper's Figure 6: stages shaded, several runs overlaid.

    python tools/plot_run.py RUN [RUN ...] [--out run.png] [--names a,b] [--keys loss,loss_flow,grad_norm,...]

RUN is a run's folder (its metrics.jsonl, and eval.jsonl where there is one, drawn dashed) or a metrics.jsonl.
One run: its losses in one panel and each monitor in its own. Several: a panel a number, a colour a run; the
stages shaded are those of the longest run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import numpy as np  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from nextvid_mcore.config import ConfigError, require  # noqa: E402
from nextvid_mcore.evaluation.pictures import (  # noqa: E402
    LOSSES,
    draw_losses,
    mark_lost,
    plain,
    running_mean,
    save,
    shade_stages,
)
from nextvid_mcore.evaluation.results import picture_file  # noqa: E402
from nextvid_mcore.training import metrics  # noqa: E402

TITLES = {
    "loss": "loss",
    "loss_flow": "flow loss",
    "loss_align": "alignment loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "lr_flow": "learning rate of the decoder",
    "z_var": "variance of the prediction z",
    "reference_var": "variance of the reference features",
    "align_cos": "cosine of prediction and reference",
    "clips_per_s": "clips a second",
}
DEFAULT = [name for name in TITLES if name not in ("lr_flow", "clips_per_s")]  # and every online kNN
KNN = "knn_"  # of eval.jsonl: percent right by task, and beside it
KNN_COST = ("knn_clips", "knn_time", "knn_share")
COLUMNS = 2
LOGARITHMIC = ("grad_norm", "z_var", "reference_var")  # they fall, or collapse, by orders of magnitude


@dataclass(frozen=True)
class Run:
    """Rows of one run."""

    name: str
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Run:
        file = path / "metrics.jsonl" if path.is_dir() else path
        require(file.is_file(), f"{file} does not exist; give a run's folder or its metrics.jsonl")
        rows, held_out = metrics.read(file), metrics.read(file.with_name("eval.jsonl"))
        require(len(rows) > 0, f"{file} holds no step to draw")
        default = path.resolve().name if path.is_dir() else path.resolve().parent.name
        return cls(name or default, rows, held_out)

    @property
    def steps(self) -> np.ndarray:
        return np.array([row["step"] for row in self.rows])

    def values(self, key: str) -> np.ndarray:
        """Of every step; nan where it isn't a number."""
        return np.array([_number(row.get(key)) for row in self.rows])

    def evaluated(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and held-out values of the EMA, where there are any: not every line has each."""
        rows = [(row["step"], row if key.startswith(KNN) else row.get("ema", {})) for row in self.held_out]
        pairs = [(step, _number(row.get(key))) for step, row in rows]
        pairs = [(step, value) for step, value in pairs if np.isfinite(value)]
        return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)

    def has(self, key: str) -> bool:
        if key == "loss":  # that none is finite is worth seeing
            return True
        found = self.evaluated(key)[1] if key.startswith(KNN) else self.values(key)
        return bool(np.isfinite(found).any())

    @property
    def knn(self) -> set[str]:
        """Its online kNN's tasks."""
        return {key for row in self.held_out for key in row if key.startswith(KNN)} - set(KNN_COST)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan


def draw_values(ax: Axes, run: Run, key: str, colour: object, label: str | None, window: int) -> None:
    """One line: the running mean over `window` values on top of the pale values; held-out ones dashed."""
    if key.startswith(KNN):
        ax.plot(*run.evaluated(key), color=colour, linewidth=1.5, label=label, marker="o", markersize=3)
        return
    steps, values = run.steps, run.values(key)
    if window > 1 and not np.isnan(values).all() and key not in ("lr", "lr_flow"):
        ax.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        values = running_mean(values, window)
    there = np.isfinite(values)
    sparse = there.sum() <= max(3, len(values) // 5)  # written every now and then
    if sparse:
        steps, values = steps[there], values[there]
    ax.plot(
        steps, values, color=colour, linewidth=1.5, label=label, marker="o" if sparse else None, markersize=3
    )
    if key == "loss":
        mark_lost(ax, run.steps, run.values(key), colour)
    at, held_out = run.evaluated(key)
    if np.isfinite(held_out).any():
        ax.plot(at, held_out, "--", color=colour, linewidth=1.2, marker=".", markersize=5)


def figure(runs: list[Run], keys: list[str]) -> Figure:
    """A panel a number that any of the runs has."""
    keys = [key for key in keys if any(run.has(key) for run in runs)]
    require(len(keys) > 0, "the runs have none of these numbers")
    together = len(runs) == 1 and sum(key in LOSSES for key in keys) > 1  # the losses in one panel
    panels = (["losses"] if together else []) + [key for key in keys if not (together and key in LOSSES)]
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    out = Figure(figsize=(6.2 * columns, 0.5 + 3.1 * lines), dpi=110, layout="constrained")
    axes = out.subplots(lines, columns, squeeze=False).flat
    longest = max(runs, key=lambda run: run.steps[-1])
    stages = [str(row.get("stage", "")) for row in longest.rows]
    for ax, panel in zip(axes, panels, strict=False):
        if panel == "losses":
            draw_losses(ax, runs[0].rows)
            for key, (_, colour) in LOSSES.items():
                at, held_out = runs[0].evaluated(key)
                if key in keys and np.isfinite(held_out).any():
                    ax.plot(at, held_out, "--", color=colour, linewidth=1.2, marker=".", markersize=5)
            ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
        else:
            for number, run in enumerate(runs):
                colour = "#1f77b4" if len(runs) == 1 else colormaps["tab10"](number % 10)
                draw_values(ax, run, panel, colour, run.name, len(longest.steps) // 100 * 2 + 1)
            if len(runs) > 1 and panel == panels[0]:
                ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
        if panel in LOGARITHMIC:
            ax.set_yscale("log")
        if panel.startswith(KNN):
            ax.set_ylim(bottom=0)
        shade_stages(ax, stages, longest.steps)
        knn = f"online kNN, {panel.removeprefix(KNN)} (%)" if panel.startswith(KNN) else panel
        ax.set_title(TITLES.get(panel, knn), pad=18, fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        plain(ax)
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(which="both", labelsize=8)
    for ax in list(axes):
        ax.set_visible(False)  # of a last line that isn't full
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    dashed = any(len(run.evaluated(key)[1]) for run in runs for key in keys if not key.startswith(KNN))
    out.suptitle(title + (" (dashed: held-out clips, EMA encoder)" if dashed else ""), fontsize=11)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder or a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("run.png"), help="the picture")
    parser.add_argument("--names", help="of the runs, separated by commas (default: their folders')")
    parser.add_argument(
        "--keys",
        help="numbers of metrics.jsonl to draw, and knn_TASK of eval.jsonl "
        f"(default: {','.join(DEFAULT)} and every online kNN)",
    )
    args = parser.parse_args()
    try:
        picture_file(args.out)
        names = args.names.split(",") if args.names else [None] * len(args.runs)
        require(
            len(names) == len(args.runs),
            f"--names has {len(names)} names for {len(args.runs)} runs; give one each",
        )
        runs = [Run.read(path, name) for path, name in zip(args.runs, names, strict=True)]
        keys = args.keys.split(",") if args.keys else DEFAULT + sorted(set().union(*(r.knn for r in runs)))
        none = [key for key in keys if not any(run.has(key) for run in runs)] if args.keys else []
        require(not none, f"--keys {','.join(none)}: none of the runs has such numbers")
        save(figure(runs, keys), args.out)
    except (ConfigError, OSError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
