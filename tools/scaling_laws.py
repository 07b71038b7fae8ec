"""A scaling law of finished runs: their table, the law, what a budget buys, and a picture.

    python tools/scaling_laws.py RUN RUN ... [--out scaling.png] [--budget 1e18 1e19] [--json law.json]

RUN is the folder of a run with held-out losses (--data.eval-manifest, --eval.every) up to the end of its
schedule. Runs differ in the encoder's size and in how many clips they see; what their held-out loss is
measured on must be the same. The law is E + A / N^alpha + B / D^beta (nextvid_mcore/evaluation/scaling.py),
its numbers with what they are when any one run is left out. Default: the flow loss, whose target is the same
in every run; the alignment loss is measured against the run's own features, and compares nothing.
examples/scaling/run.sh makes such runs. Needs the extra `tools`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import numpy as np  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from nextvid_mcore.config import ConfigError, require  # noqa: E402
from nextvid_mcore.evaluation.pictures import plain, save  # noqa: E402
from nextvid_mcore.evaluation.results import picture_file, writable_folder, write_json  # noqa: E402
from nextvid_mcore.evaluation.scaling import (  # noqa: E402
    STEEPEST,
    VALUES,
    Best,
    Cost,
    End,
    Law,
    best,
    end,
    fit,
    lacking,
    measured_by,
    without_one,
)
from nextvid_mcore.hub import HubError, export  # noqa: E402
from nextvid_mcore.training import metrics  # noqa: E402

LABELS = {"loss_flow": "flow loss", "loss_align": "alignment loss", "loss": "loss"}
FARTHER = (10.0, 100.0)  # budgets over the largest run's
WIDER = 10.0  # sizes that are tried, beyond the runs'


def read(folders: Sequence[Path], value: str) -> list[End]:
    """The ends of runs that can be compared, by size and clips.

    Raises:
        ConfigError, HubError: a folder is no run's, or two runs measure their losses on different things.
    """
    ends, first = [], None
    for folder in folders:
        config = export.read_run(folder)
        mine = json.loads(json.dumps(measured_by(config, value)))
        first = first or (folder, mine)
        for key, here in mine.items():
            require(
                here == first[1][key],
                f"{folder} has --{key.replace('_', '-')} {here} and {first[0]} {first[1][key]}: their "
                "held-out losses can't be compared; give runs that agree in it",
            )
        ends.append(end(folder.resolve().name, config, metrics.read(folder / "eval.jsonl"), value))
    return sorted(ends, key=lambda e: (e.parameters, e.clips))


def amount(x: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def table(ends: Sequence[End], law: Law | None) -> list[str]:
    width = max(len("run"), *(len(e.name) for e in ends))
    lines = [f"{'run':<{width}} {'N':>7} {'clips':>7} {'FLOPs':>9} {'loss':>8} {'law':>8} {'off':>7}"]
    for e in ends:
        line = f"{e.name:<{width}} {amount(e.parameters):>7} {amount(e.clips):>7} {e.flops:>9.2e} "
        if e.left_out:
            lines.append(f"{line}left out: {e.left_out}")
            continue
        by = "" if law is None else f" {law.loss(e.parameters, e.clips):>8.4f}"
        off = "" if law is None else f" {e.loss / law.loss(e.parameters, e.clips) - 1:>+7.1%}"
        lines.append(f"{line}{e.loss:>8.4f}{by}{off}")
    return lines


def told(law: Law, others: Sequence[Law]) -> list[str]:
    """The law's numbers, and between what they lie without any one run."""
    lines = [f"L = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"]
    for key in ("E", "alpha", "beta") if others else ():
        found = [getattr(other, key) for other in others]
        line = f"  {key} is {min(found):.3g} to {max(found):.3g} without any one of the runs"
        if key != "E" and not 0.01 < min(found) <= max(found) < 0.99 * STEEPEST:
            line += ": they do not settle it"
        lines.append(line)
    return lines


def figure(ends: Sequence[End], law: Law | None, bests: Sequence[Best], value: str) -> Figure:
    """Losses by FLOPs, a colour a size; with a law its lines, and what is best at every budget."""
    out = Figure(figsize=(11 if bests else 6.2, 4.2), dpi=110, layout="constrained")
    axes = out.subplots(1, 2 if bests else 1, squeeze=False)[0]
    sizes = sorted({e.parameters for e in ends})
    colours = {size: colormaps["viridis"](i / max(1, len(sizes))) for i, size in enumerate(sizes)}
    for size in sizes:
        mine = [e for e in ends if e.parameters == size]
        axes[0].plot(
            [e.flops for e in mine], [e.loss for e in mine], "o", color=colours[size], label=amount(size)
        )
        if law is not None:
            D = np.geomspace(min(e.clips for e in mine), max(e.clips for e in mine), 50)
            axes[0].plot(
                D * mine[0].flops / mine[0].clips, law.loss(size, D), color=colours[size], linewidth=1.2
            )
    axes[0].set_ylabel(f"held-out {LABELS[value]} (EMA)", fontsize=9)
    axes[0].set_yscale("log")
    for axis_format in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        axis_format("{x:g}")
    if bests:
        axes[0].plot(
            [b.flops for b in bests], [b.loss for b in bests], "k--", linewidth=1, label="best by the law"
        )
        axes[1].plot([b.flops for b in bests], [b.parameters for b in bests], "k--", linewidth=1)
        axes[1].plot(
            [e.flops for e in ends], [e.parameters for e in ends], "o", color="#999999", label="runs"
        )
        axes[1].set_ylabel("parameters of the encoder", fontsize=9)
        axes[1].set_yscale("log")
    for ax in axes:
        ax.set_xscale("log")
        plain(ax, grid="both")
        ax.set_xlabel("FLOPs of training", fontsize=9)
        ax.tick_params(which="both", labelsize=8)
        ax.legend(frameon=False, fontsize=8)
    return out


def bought(law: Law, cost: Cost, ends: Sequence[End], budgets: Sequence[float]) -> list[Best]:
    sizes = [e.parameters for e in ends]
    return [best(law, cost, budget, (min(sizes) / WIDER, max(sizes) * WIDER)) for budget in budgets]


def report(ends: Sequence[End], value: str, budgets: Sequence[float] | None, out: Path) -> dict:
    """Print the tables, draw the picture; what --json holds."""
    counted = [e for e in ends if e.left_out is None]
    reason = lacking(counted)
    law = None if reason else fit(counted)
    print("\n".join(table(ends, law)))
    require(len(counted) > 0, "none of these runs has a held-out loss at its schedule's end")
    most = max(e.flops for e in counted)
    if law is None:
        print(f"no law: {reason}")
        save(figure(counted, None, [], value), out)
        return {"runs": [vars(e) for e in ends], "law": None}
    print("\n".join(["", *told(law, without_one(counted, law)), ""]))
    cost = Cost.of(counted)
    wanted = bought(law, cost, counted, budgets or [most * factor for factor in FARTHER])
    print(f"{'FLOPs':>9} {'N':>7} {'clips':>7} {'loss':>8}")
    for b in wanted:
        notes = [f"{b.flops / most:.3g} times the largest run's"] if b.flops > most else []
        notes += ["the best size lies beyond those tried: the law sees no optimum there"] if b.edge else []
        line = f"{b.flops:>9.2e} {amount(b.parameters):>7} {amount(b.clips):>7} {b.loss:>8.4f}"
        print(f"{line}  {'; '.join(notes)}")
    drawn = np.geomspace(min(e.flops for e in counted), max(most, *(b.flops for b in wanted)), 60)
    inside = [b for b in bought(law, cost, counted, drawn) if not b.edge]
    save(figure(counted, law, inside, value), out)
    return {"runs": [vars(e) for e in ends], "law": vars(law), "best": [vars(b) for b in wanted]}


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of FLOPs; give one such as 1e18")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("scaling.png"), help="the picture")
    parser.add_argument("--value", choices=VALUES, default=VALUES[0], help="of eval.jsonl")
    parser.add_argument("--budget", type=positive, nargs="+", metavar="FLOPS", help="what is to be bought")
    parser.add_argument("--json", type=Path, help="the numbers, for other programs")
    args = parser.parse_args()
    try:
        picture_file(args.out)
        if args.json:
            writable_folder(args.json.parent, "--json")
        found = report(read(args.runs, args.value), args.value, args.budget, args.out)
        if args.json:
            write_json(args.json, metrics.strict(found))
    except (ConfigError, HubError, OSError) as error:
        print(f"scaling_laws: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
