#!/usr/bin/env bash
# The runs of docs/results.md on one GPU: bash examples/ablations/run.sh --minutes 9 [--rows ROW ...]
# Resumable, stops by itself; see `run.sh --help`. Exit status 3: something is not run yet.
set -euo pipefail
export OMP_NUM_THREADS=1
here=$(dirname "${BASH_SOURCE[0]}")
venv=$here/../../.venv/bin/python # of scripts/install.sh
exec "${PYTHON:-$([ -x "$venv" ] && echo "$venv" || echo python3)}" "$here/run_queue.py" "$@"
