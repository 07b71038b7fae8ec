"""A resumable queue of the runs in ablation_rows.py: several at once on one GPU, stops by itself.

    python examples/ablations/run_queue.py --minutes 9 [--rows full random ...] [--workers 8]

One line of JSON is appended to --results when a run ends. A run whose line is there is never repeated; one
that was under way when the time was over is lost and begins anew. Ends with what was not run. The default
--results has the runs of docs/results.md: give another FILE to make them again. On a core of a CPU a run of
the default size takes an hour, and --minutes must be more; to see the queue work, make the runs smaller:
--steps 100 --batch 16 --probe-train 400 --probe-test 200.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1], HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # so that it runs from a clone that isn't installed

from ablation_rows import Budget, Run, table  # noqa: E402

from nextvid_mcore.config import ConfigError, require  # noqa: E402

RESULTS = HERE / "results" / "results.jsonl"
AFTER = 10.0  # seconds of a run's probe
Serve = Callable[[Connection], None]


def serve_runs(link: Connection) -> None:
    """A worker's process; what is heavy is imported there."""
    # megatron-core warns of every optional package that isn't there: forty lines over one of ours
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    from ablation_run import serve

    serve(link)


def commit() -> str:
    """Of the code that runs; a file COMMIT beside the package serves where there is no git."""
    mark = HERE.parents[1] / "COMMIT"
    if mark.exists():
        return mark.read_text().strip()
    found = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def finished(file: Path, mend: bool = False) -> dict[str, dict[str, Any]]:
    """key -> line. A last line that a kill cut short doesn't count; `mend`: it is cut off the file."""
    if not file.exists():
        return {}
    text = file.read_bytes()
    *whole, rest = text.split(b"\n")
    if rest.endswith(b"}"):  # nothing is lost but the line's end
        whole, rest = [*whole, rest], b""
        if mend:
            file.write_bytes(text + b"\n")
    rows = {}
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file}, line {number} is no run's result; name another --results") from None
    if rest:
        require(rest.startswith(b"{"), f"{file} ends with what is no run's result; name another --results")
        if mend:
            os.truncate(file, len(text) - len(rest))
    return rows


def append(file: Path, row: dict[str, Any]) -> None:
    with open(file, "a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


class Worker:
    """A process and the run it has."""

    def __init__(self, serve: Serve) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.run: Run | None = None
        self.began = 0.0
        self.share = 0.0  # seconds of the GPU that the run has had, if all runs get the same

    def give(self, run: Run) -> None:
        self.run, self.began, self.share = run, time.monotonic(), 0.0
        self.link.send(run)

    def end(self) -> None:
        """At once: a run under way is lost."""
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


def drain(
    runs: Sequence[Run],
    file: Path,
    seconds: float,
    workers: int,
    serve: Serve = serve_runs,
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Run what isn't in `file` yet until done or `seconds` have passed. Returns what is still not run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    began, mark = time.monotonic(), commit()
    have = finished(file, mend=True)
    left = [run for run in runs if run.key not in have]
    lacking: dict[str, list[str]] = {}
    for run in left:
        if what := run.missing():
            lacking.setdefault(what, []).append(run.name)
    for what, names in lacking.items():
        say(f"needs {what}: {', '.join(names)}")
    todo = [run for run in left if not run.missing()]
    begun, failed, costs = len(left), 0, []  # costs: the GPU's seconds a step
    traces: set[str] = set()
    pool = [Worker(serve) for _ in range(min(workers, len(todo)))]
    counted = began

    def count() -> None:
        """Share the time since the last call among those that were busy."""
        nonlocal counted
        now, busy = time.monotonic(), [worker for worker in pool if worker.run is not None]
        for worker in busy:
            worker.share += (now - counted) / len(busy)
        counted = now

    def fits(run: Run) -> bool:
        """Beside all that run now, were they to last; what is cut by the end is lost."""
        need = 0.0
        if costs and run.until is None and run.steps:
            busy = 1 + sum(worker.run is not None for worker in pool)
            need = sorted(costs)[len(costs) // 2] * run.steps * busy + AFTER
        return time.monotonic() - began + need < seconds

    def hand_out() -> None:
        """To all that are idle: a run that didn't fit beside many may fit beside few."""
        for worker in pool:
            if worker.run is None and (run := next((run for run in todo if fits(run)), None)) is not None:
                todo.remove(run)
                worker.give(run)

    hand_out()
    try:
        while busy := {worker.link: worker for worker in pool if worker.run is not None}:
            remaining = seconds - (time.monotonic() - began)
            ready = wait(list(busy), timeout=max(0.0, remaining)) if remaining > 0 else []
            if not ready:
                break
            count()
            for link in ready:
                worker = busy[link]
                try:
                    run, row, error = link.recv()
                except (EOFError, ConnectionError):
                    worker.process.join(5)
                    run, row, error = (
                        worker.run,
                        None,
                        f"its process died (exit code {worker.process.exitcode})",
                    )
                    pool[pool.index(worker)] = Worker(serve)
                took = time.monotonic() - worker.began
                if row is None:
                    failed += 1
                    text = error.strip()
                    say(f"{run.name} FAILED: {text.splitlines()[-1] if text in traces else text}")
                    traces.add(text)
                else:
                    append(file, row | {"commit": mark})
                    left.remove(run)
                    if run.kind == "pretrain" and run.until is None:
                        costs.append(worker.share / run.steps)
                    scores = ", ".join(f"{task} {each['top1']:.1f}" for task, each in row["probe"].items())
                    say(f"{time.monotonic() - began:6.0f} s  {run.name}: {scores}  ({took:.0f} s)")
                worker.run = None
            hand_out()
    finally:
        cut = [(worker.run.name, time.monotonic() - worker.began) for worker in pool if worker.run]
        for worker in pool:
            worker.end()
    if cut:
        lost = ", ".join(f"{name} ({took:.0f} s)" for name, took in cut)
        more = "; give more --minutes, or smaller runs (--help)" if len(left) == begun else ""  # else stuck
        say(f"time is over; under way and lost: {lost}{more}")
    say(f"{len(runs) - len(left)} of {len(runs)} runs have results; {failed} failed")
    if left:
        say("not run: " + ", ".join(run.name for run in left))
    return left


def default_workers() -> int:
    """Small networks leave a GPU idle unless many run at once; on a CPU each takes a core."""
    import torch

    cores = len(os.sched_getaffinity(0))
    return 8 if torch.cuda.is_available() else min(8, cores)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--minutes", type=float, default=9.0, help="of wall time, then everything stops")
    out.add_argument("--rows", nargs="+", metavar="ROW", help="these alone (default: the whole table)")
    out.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these alone")
    out.add_argument(
        "--workers", type=int, help="runs at once (default: 8 on a GPU, one for every core without)"
    )
    out.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    out.add_argument("--list", action="store_true", help="show the runs and whether they have a result")
    budget = out.add_argument_group("the size of every run")
    for name, value in vars(Budget()).items():
        budget.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        require(args.minutes > 0, f"--minutes {args.minutes}: give more than 0")
        require(args.workers is None or args.workers >= 1, f"--workers {args.workers}: give 1 or more")
        runs = table(Budget(**{name: getattr(args, name) for name in vars(Budget())}), args.rows, args.seeds)
        require(bool(runs), f"--seeds {args.seeds}: no row has them; see --list")
        have = finished(args.results)
    except ConfigError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    if args.list:
        for run in runs:
            print(f"{'done   ' if run.key in have else 'not run'}  {run.name}, {run.steps} steps")
        return 0

    def say(text: str) -> None:
        print(text, flush=True)

    if importlib.util.find_spec("torch") is None:
        print(
            f"ablations: {sys.executable} lacks torch; run scripts/install.sh train,demo, or set PYTHON",
            file=sys.stderr,
        )
        return 2
    if any(run.key not in have and not run.real for run in runs):
        from nextvid_mcore.data.moving_digits import DigitsError, mnist_file

        try:
            mnist_file()
        except DigitsError as error:
            print(f"ablations: {error}", file=sys.stderr)
            return 2
    workers = args.workers or default_workers()
    return 3 if drain(runs, args.results, 60 * args.minutes, workers, say=say) else 0


if __name__ == "__main__":
    sys.exit(main())
