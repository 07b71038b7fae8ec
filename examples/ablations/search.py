"""Which settings learn in a few minutes: every candidate trains equally long, all at once, then is probed.

    python examples/ablations/search.py --minutes 3 --workers 14 --results search.jsonl [--vae DIR]

`CANDIDATES` differ from `BASE` in what their name says. GPU time is what is scarce, so each gets the same
seconds of a GPU shared by all: it trains until `--reserve` seconds before the end, and its learning rates
run through their schedule by the clock. What is called random is what to compare with. Lines of JSON are
appended as candidates end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_queue import drain, finished  # puts this clone on the path

from ablation_rows import Budget, Run, base, part, probe_of  # isort: skip
from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, require

BASE: dict[str, Any] = {
    "batch": 128,
    "side": 22,
    "peak": 1e-3,
    "init_std": 0.02,
    "pixel_scale": 8.0,
    "ema": 0.995,
    "other": "192x2",
    "compile": 0,  # all processes at once would compile the same
}
# Of a candidate, besides fields of Budget: a row of recipes.ablations, a size of recipes.digits, a seed.
ROW, SIZE, SEED = "row", "size", "seed"
CANDIDATES: dict[str, dict[str, Any]] = {
    "base": {},
    "gen": {ROW: "table2_gen_ciso"},
    "align": {ROW: "table2_align_ciso"},
    "flow_1_align_0.1": {"flow": 1.0, "align": 0.1},
    "patch_4_8_frames": {"patch": 4, "frames": 8, "batch": 64},
    "8_frames": {"frames": 8},
    "side_14": {"side": 14},
    "lr_0.002": {"peak": 2e-3},
    "lr_0.0005": {"peak": 5e-4},
    "ema_0.998": {"ema": 0.998},
    "ema_0.98": {"ema": 0.98},
    "scale_3": {"pixel_scale": 3.0},
    "batch_64": {"batch": 64},
    "compiled": {"compile": 1, SEED: 1},
    "random": {},
    "random_side_14": {"side": 14},
    "random_patch_4": {"patch": 4, "frames": 8},
    "random_init_0.06": {"init_std": 0.06},
    "vae": {"target": "vae", "vae": ""},  # --vae
}


def candidate(name: str, until: float, changes: dict[str, Any]) -> Run:
    """The run called `name`; `changes` are of every candidate."""
    require(name in CANDIDATES, f"no candidate {name!r}; there are {', '.join(CANDIDATES)}")
    mine = dict(CANDIDATES[name])
    row, size, seed = mine.pop(ROW, None), mine.pop(SIZE, "m"), mine.pop(SEED, 0)
    budget = dataclasses.replace(Budget(), **(BASE | mine | changes))
    config = base(budget, size)
    if row is not None:
        config = recipes.ablate(config, row)
    config = part(config, "train", seed=seed)
    kind = name.partition("_")[0]
    kind = kind if kind in ("random", "pixels", "supervised") else "pretrain"
    return Run(name, seed, kind, config, probe_of(budget, kind, seed), until if kind == "pretrain" else None)


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, default=3.0, help="of wall time, then everything stops")
    flags.add_argument("--reserve", type=float, default=25.0, help="seconds of it for the probes")
    flags.add_argument("--names", nargs="+", metavar="NAME", help="these candidates alone")
    flags.add_argument("--workers", type=int, default=14, help="runs at once")
    flags.add_argument("--vae", metavar="DIR", help="of tools/train_vae.py, for the candidate that needs it")
    flags.add_argument("--results", type=Path, required=True, metavar="FILE")
    flags.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of Budget, in all of them"
    )
    args = flags.parse_args(argv)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Budget)}
    try:
        changes = {}
        for text in args.set:
            name, _, value = text.partition("=")
            require(name in kinds, f"--set {text}: fields are {', '.join(kinds)}")
            changes[name] = kinds[name](value)
        names = args.names or [name for name in CANDIDATES if "vae" not in CANDIDATES[name] or args.vae]
        if args.vae:
            CANDIDATES["vae"]["vae"] = args.vae
        until = time.time() + 60 * args.minutes - args.reserve
        runs = [candidate(name, until, changes) for name in names]
        drain(runs, args.results, 60 * args.minutes, args.workers, say=lambda text: print(text, flush=True))
    except ConfigError as error:
        print(f"search: {error}", file=sys.stderr)
        return 2
    scored = sorted(
        finished(args.results).values(), key=lambda row: -sum(x["top1"] for x in row["probe"].values())
    )
    for row in scored:
        scores = "  ".join(f"{task} {x['top1']:5.1f}" for task, x in row["probe"].items())
        final = ", ".join(f"{name} {value:.3g}" for name, value in row.get("final", {}).items())
        print(f"{row['row']:20s} {scores}  {row['steps']:5d} steps of {row.get('step_ms')} ms  {final}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
