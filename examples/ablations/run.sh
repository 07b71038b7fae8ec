#!/usr/bin/env bash
# The runs of docs/results.md on one GPU: bash examples/ablations/run.sh --minutes 9 [--rows ROW ...]
# Resumable, stops by itself; see `run.sh --help`. Exit status 3: something is not run yet.
set -euo pipefail
export OMP_NUM_THREADS=1
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run_queue.py" "$@"
