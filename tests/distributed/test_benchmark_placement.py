"""benchmarks/placement.py on gloo: every case in the table, whatever one of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_MEMORY = """
import os, sys
sys.path.insert(0, {benchmarks!r})
import placement, torch
inner = placement.run_case
def run_case(config, steps, warmup):
    if os.environ["RANK"] == "1" and config.parallel.reference == "generator":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    return inner(config, steps, warmup)
placement.run_case = run_case
if __name__ == "__main__":
    sys.exit(placement.main())
"""


def test_a_case_that_runs_out_of_memory_does_not_end_the_table(tmp_path: Path):
    script, out = tmp_path / "program.py", tmp_path / "placement.jsonl"
    script.write_text(OUT_OF_MEMORY.format(benchmarks=str(ROOT / "benchmarks")))
    two = "--parallel.placement two-groups"
    splits = ["", f"{two} --parallel.reference generator", two, "--parallel.placement three-groups"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", str(script), "tiny", "--tau", "1", "--precision", "fp32"]
    command += [
        "--micro-batch",
        "1",
        "--micro-batches",
        "2",
        "--steps",
        "1",
        "--warmup",
        "0",
        "--out",
        str(out),
    ]
    for split in splits:
        command += ["--split", split]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = [line.strip() for line in lines[lines.index("tiny, tau 1") + 1 :]]
    assert [line.split("  ")[-1].split(" (")[0].split(":")[0] for line in table] == [
        "colocated",
        "two-groups reference generator",
        "two-groups",
        "three-groups",
    ]
    assert "rank 1: CUDA out of memory" in table[1] and "start at least 3 ranks" in table[3]

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    one, two = (row for row in rows if "rate" in row)
    assert one["ceiling"] == one["expected"] == 1 and set(one["seats"]) == {"all"}
    assert one["seats"]["all"]["idle"] == 0 and one["rate"] > 0
    assert two["micro_batches"] == 4  # as many clips a process as colocated
    assert 0 < two["expected"] < 1 and 0 < two["ceiling"] < 1
    assert all(0 < seat["idle"] < 1 for seat in two["seats"].values())
