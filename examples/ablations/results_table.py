"""Tables of docs/results.md from results.jsonl: each row beside the paper's, rows without a result said so.

    python examples/ablations/results_table.py [--write docs/results.md]

Without --write the tables are printed; with it they replace what stands between the file's two markers.
Flags of the size of a run are run_queue.py's, and have to be those of the results.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_queue import finished, parser  # puts this clone on the path

from ablation_rows import WIDE, Budget, Run, table  # isort: skip
from nextvid_mcore.config import ConfigError, require

BEGIN, END = "<!-- tables: results_table.py -->", "<!-- end of tables -->"
TASKS = ("digit", "direction")
REAL_TASKS = ("shot", "backwards", "speed")
LABEL = {
    "full": "Generation, alignment, context isolation: the full model",
    "random": "Random encoder",
    "random_wide": f"Random encoder, initial weights of {WIDE}",
    "pixels": "Raw pixels (32 x 32), linear",
    "supervised": "Supervised from scratch, same encoder and clips",
    "table2_gen": "Generation",
    "table2_gen_ciso": "Generation, context isolation",
    "table2_align": "Alignment",
    "table2_align_ciso": "Alignment, context isolation",
    "table4_no_mask": "Without masking",
    "table5_cross_self": "Cross-self attention",
    "table5_cross": "Cross attention",
    "table11_tau4": "4 tau samples",
    "table11_2x": "1 tau sample, twice the steps",
    "table11_tau4_2x": "4 tau samples, twice the steps",
    "table12_no_ema": "Without EMA",
    "table3_pixels": "Pixels",
    "table3_siglip2": "SigLIP2's features",
    "table3_cosmos": "Latents of Cosmos's video VAE",
    "table3_vae": "Latents of a small VAE trained on the same clips (the paper: VA-VAE)",
    "real_full": "The full model",
    "real_random": "Random encoder",
    "real_align": "Alignment, context isolation",
    "real_supervised": "Supervised from scratch",
    "align_raw": "Alignment target as it is, not layer-normed",
    "decoder_wide": "Predictor and decoder as wide as the target has channels (384, not 192)",
    "decoder_wide_gen": "The same, generation and context isolation alone",
    "mask_packed": "Masks: packed, whatever the blocks leave",
    "mask_truncate": "Masks: cut at the smallest count of the batch",
}
FIRST = ("pixels", "random", "random_wide", "full", "table2_align_ciso", "supervised")
# title, what the paper's columns are, rows: (row, the paper's numbers, label if not LABEL's)
SECTIONS: list[tuple[str, str, list[tuple[str, str, str | None]]]] = [
    ("Does it learn?", "", [(row, "", None) for row in FIRST]),
    (
        "Table 2: model design",
        "IN1K / SSv2",
        [
            ("table2_gen", "76.8 / 61.1", None),
            ("table2_gen_ciso", "75.0 / 58.7", None),
            ("table2_align", "74.7 / 62.8", None),
            ("table2_align_ciso", "73.1 / 61.9", None),
            ("full", "75.1 / 63.8", None),
        ],
    ),
    (
        "Table 12: momentum reference",
        "IN1K / SSv2",
        [("table12_no_ema", "< 10 / < 10", None), ("full", "75.1 / 63.8", "With EMA: the full model")],
    ),
    (
        "Table 3: what is generated",
        "IN1K / SSv2",
        [
            ("table3_pixels", "73.5 / 62.4", None),
            ("table3_siglip2", "73.2 / 62.5", None),
            ("table3_cosmos", "71.7 / 54.8", None),
            ("table3_vae", "75.1 / 63.8", None),
        ],
    ),
    (
        "Table 4: masking (no alignment)",
        "IN1K / SSv2",
        [("table4_no_mask", "31.0 / 14.7", None), ("table2_gen_ciso", "75.0 / 58.7", "With masking")],
    ),
    (
        "Table 5: attention of the decoder (no alignment)",
        "IN1K / SSv2",
        [
            ("table5_cross_self", "72.6 / 54.2", None),
            ("table5_cross", "75.0 / 58.7", None),
            ("table2_gen_ciso", "", "Concatenated: the default, no row of the paper's"),
        ],
    ),
    (
        "Table 11: tau samples",
        "IN1K / SSv2 after 15K and 30K steps",
        [
            ("full", "75.3 / 63.8", "1 tau sample: the full model here"),
            ("table11_tau4", "75.1 / 63.8", None),
            ("table11_2x", "79.3 / 67.1", None),
            ("table11_tau4_2x", "79.4 / 67.7", None),
        ],
    ),
    (
        "Choices the paper is silent on",
        "",
        [(row, "", None) for row in ("full", "align_raw", "mask_packed", "mask_truncate")],
    ),
    (
        "The decoder's width",
        "",
        [(row, "", None) for row in ("full", "decoder_wide", "table2_gen_ciso", "decoder_wide_gen")],
    ),
]
REAL_ROWS = ("real_random", "real_full", "real_align", "real_supervised")
SIZES = (("s", "0.8M"), ("m", "3.3M"), ("l", "5.1M"))
SHARES = ("0.25", "0.5", "1")
NO_RUN = ("table3_siglip2", "table3_cosmos")  # rows of the paper's whose networks have no weights here


def cell(results: Sequence[dict[str, Any]], task: str) -> str:
    """One seed: top-1 with its 95% interval. Several: mean, deviation and each."""
    if not results:
        return "not run"
    values = [row["probe"][task]["top1"] for row in results]
    if len(values) == 1:
        low, high = results[0]["probe"][task]["ci95"]
        return f"{values[0]:.1f} ({low:.1f} to {high:.1f})"
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return f"{mean:.1f} ± {spread:.1f} ({', '.join(f'{x:.1f}' for x in values)})"


def hardware(results: Sequence[dict[str, Any]]) -> str:
    """What the runs were made on: H100 of "NVIDIA H100 80GB HBM3"."""
    names = [row.get("device", "unknown").removeprefix("NVIDIA ").split()[0] for row in results]
    return ", ".join(dict.fromkeys(names)) or "-"


def tables(runs: Sequence[Run], have: dict[str, dict[str, Any]]) -> str:
    """All tables in Markdown."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run.key in have:
            found.setdefault(run.row, []).append(have[run.key])
    same = {"table3_pixels", "table3_vae"} - {run.row for run in runs}  # left out: `full` is that run
    out: list[str] = []
    sections = [(*section, TASKS) for section in SECTIONS]
    sections.append(("Real clips", "", [(row, "", None) for row in REAL_ROWS], REAL_TASKS))
    for title, columns, rows, tasks in sections:
        head = ["run", *tasks, "seeds", "clips", "on"] + ([f"paper: {columns}"] if columns else [])
        out += [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for row, paper, label in rows:
            mine = found.get("full" if row in same else row, [])
            seeds = ", ".join(str(each["seed"]) for each in mine) or "-"
            clips = f"{mine[0]['clips']:,}" if mine else "-"
            cells = [label or LABEL[row], *(cell(mine, task) for task in tasks), seeds, clips, hardware(mine)]
            out.append("| " + " | ".join(cells + ([paper or "-"] if columns else [])) + " |")
        out.append("")
    clips = {run.row: run.clips for run in runs}
    out += ["### Scaling (Figure 4's axes): digit / direction", ""]
    top = [f"{clips.get(f'scale_s_{share}', 0):,} clips" for share in SHARES]
    out += ["| encoder | " + " | ".join(top) + " |", "| --- |" + " --- |" * len(SHARES)]
    for size, millions in SIZES:
        names = ["full" if (size, share) == ("m", "1") else f"scale_{size}_{share}" for share in SHARES]
        cells = []
        for name in names:
            mine = found.get(name, [])[:1]  # seed 0
            scores = " / ".join(f"{x['probe'][t]['top1']:.1f}" for x in mine for t in TASKS)
            cells.append(f"{scores} ({hardware(mine)})" if mine else "not run")
        out.append(f"| {millions} | " + " | ".join(cells) + " |")
    missing = [run.name for run in runs if run.key not in have]
    out += ["", f"{len(runs) - len(missing)} of {len(runs)} runs have results."]
    out.append("Not run: " + ", ".join(missing) + "." if missing else "Every run of the table was made.")
    without = " and ".join(LABEL[row] for row in NO_RUN)
    out.append(f"No run of the queue: {without}, whose published weights were not at hand.")
    return "\n".join(out)


def write(file: Path, text: str) -> None:
    """Replace what stands between the markers."""
    old = file.read_text()
    require(
        old.count(BEGIN) == old.count(END) == 1 and old.index(BEGIN) < old.index(END),
        f"{file} needs one line {BEGIN} and, below it, one line {END}",
    )
    file.write_text(old[: old.index(BEGIN) + len(BEGIN)] + f"\n\n{text}\n\n" + old[old.index(END) :])


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser()
    flags.description = __doc__
    flags.add_argument("--write", type=Path, metavar="FILE")
    args = flags.parse_args(argv)
    try:
        runs = table(Budget(**{name: getattr(args, name) for name in vars(Budget())}), args.rows, args.seeds)
        text = tables(runs, finished(args.results))
        if args.write is None:
            print(text)
        else:
            write(args.write, text)
    except ConfigError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
