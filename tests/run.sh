#!/usr/bin/env bash
# Sets up .venv and runs the linter and the tests. Arguments go to pytest:
#   bash tests/run.sh                      everything
#   bash tests/run.sh tests/unit -k rope   a part
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh train,wandb,demo,dev
python=.venv/bin/python
# A process uses one thread: the distributed tests start up to four of them on what may be two cores.
export OMP_NUM_THREADS=1

status=0
$python -m ruff check . || status=1
$python -m ruff format --check . || status=1
tests=0
$python -m pytest "$@" || tests=$?
if [ "$tests" -ne 0 ]; then exit "$tests"; fi
exit "$status"
