#!/usr/bin/env bash
# Makes .venv in the clone and installs the pinned dependencies with this package in it, editable.
#   scripts/install.sh EXTRAS      EXTRAS as pip has them: train,demo
# Does nothing where the same EXTRAS were installed from the same pins. Settings of pip (another index,
# a CPU build of torch at the pinned version) are honoured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
python=.venv/bin/python
stamp=.venv/installed-$extras
pins=$(cat pyproject.toml constraints.txt scripts/demo-packages.txt | sha256sum | cut -d ' ' -f 1)
want="$PWD $pins"

if [ -x $python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && $python -c 'import torch' 2>/dev/null; then
    echo "Dependencies: .venv is up to date."
    exit 0
fi

if ! { [ -x $python ] && $python -m pip --version >/dev/null 2>&1; }; then
    found=$(bash scripts/find_python.sh)
    echo "Dependencies: making .venv with $found"
    rm -rf .venv
    "$found" -m venv .venv
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
if [ ! -d .venv/lib/python3.*/site-packages/torch ] && [ "$free" -lt 9 ]; then
    echo "Dependencies: $PWD has $free GB free and the installation needs 9 (torch with CUDA's" \
        "libraries); make room or clone elsewhere." >&2
    exit 1
fi
echo "Dependencies: installing (first time: 2.9 GB to download, 5.0 GB on disk: torch with CUDA's libraries)."
quiet=()
if [ ! -t 1 ]; then quiet=(--quiet --progress-bar off); fi
$python -m pip install "${quiet[@]}" -c constraints.txt -e ".[$extras]"
case ",$extras," in
    *,demo,*) $python -m pip install "${quiet[@]}" --no-deps -r scripts/demo-packages.txt ;;
esac
rm -f .venv/installed-*
echo "$want" >"$stamp"
