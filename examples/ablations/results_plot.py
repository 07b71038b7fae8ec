"""The picture of docs/results.md from results.jsonl: digit and direction by run, beside untrained encoders.

    python examples/ablations/results_plot.py [--results FILE] [--out docs/results.png]

A bar is the mean of a run's seeds, a dot a seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from run_queue import RESULTS, finished  # puts this clone on the path

from nextvid_mcore.config import ConfigError, require

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"digit": ("digit (appearance)", 10), "direction": ("direction (motion)", 8)}
UNTRAINED = {
    "random": ("untrained", "#222222"),
    "random_wide": ("untrained, wider initial weights", "#c0392b"),
}
BARS = {  # row: label, colour
    "supervised": ("supervised from scratch", "#8c8c8c"),
    "full": ("full model", "#1f77b4"),
    "table3_vae": ("full, VAE latents", "#1f77b4"),
    "align_raw": ("full, target not normed", "#1f77b4"),
    "table11_tau4": ("full, 4 tau samples", "#1f77b4"),
    "mask_packed": ("full, packed masks", "#1f77b4"),
    "mask_truncate": ("full, masks cut short", "#1f77b4"),
    "decoder_wide": ("full, wide decoder", "#1f77b4"),
    "table2_align_ciso": ("alignment, isolated", "#d9730d"),
    "table2_align": ("alignment", "#d9730d"),
    "table2_gen_ciso": ("generation, isolated", "#2a9d5c"),
    "table2_gen": ("generation", "#2a9d5c"),
    "decoder_wide_gen": ("generation, isolated, wide decoder", "#2a9d5c"),
    "table4_no_mask": ("generation, no masks", "#2a9d5c"),
    "table5_cross_self": ("generation, cross-self", "#2a9d5c"),
    "table5_cross": ("generation, cross", "#2a9d5c"),
    "table12_no_ema": ("full, without EMA", "#9b59b6"),
    "pixels": ("raw pixels, linear", "#8c8c8c"),
}


def draw(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Rows without a result are left out."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["row"], []).append(result["probe"])
    rows = [row for row in BARS if row in found]
    require(bool(rows), f"none of {', '.join(BARS)} has a result: nothing to draw")
    figure = Figure(figsize=(10, 0.3 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(TASKS), sharey=True)
    for panel, (task, (title, classes)) in zip(axes, TASKS.items(), strict=True):
        for height, row in enumerate(rows):
            values = [probe[task]["top1"] for probe in found[row]]
            panel.barh(height, mean(values), height=0.7, color=BARS[row][1], alpha=0.55)
            panel.plot(values, [height] * len(values), "o", color=BARS[row][1], markersize=4)
        for row, (label, colour) in UNTRAINED.items():
            for i, probe in enumerate(found.get(row, ())):
                name = f"{label} ({len(found[row])} seed{'s' * (len(found[row]) > 1)})" if i == 0 else None
                panel.axvline(probe[task]["top1"], color=colour, linestyle="--", linewidth=1, label=name)
        panel.axvline(100 / classes, color="#222222", linestyle=":", linewidth=1, label="chance")
        panel.set(xlim=(0, 101), title=f"{title}, top-1 in %")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [BARS[row][0] for row in rows])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument("--out", type=Path, default=ROOT / "docs" / "results.png")
    args = flags.parse_args(argv)
    try:
        draw(list(finished(args.results).values()), args.out)
    except ConfigError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
