#!/usr/bin/env bash
# Prints the path of a Python that can run nextvid_mcore, or one sentence that says what to install.
#   PYTHON=/path/to/python   try this one and no other
# Looks on the PATH, then among pyenv's versions, then among uv's. Every candidate is run, because a
# pyenv shim can exist and fail. 3.12 comes first: it is what the figures were measured with.
set -u

# Prints sys.executable (the real file, where the candidate is a shim); exits 3 where only venv is missing.
read -r -d '' CHECK <<'PY'
import sys, sysconfig
if sys.implementation.name != "cpython" or not (3, 12) <= sys.version_info[:2] <= (3, 14):
    sys.exit(1)
if sysconfig.get_config_var("Py_GIL_DISABLED"):  # torch and decord have no wheels for it
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    print(sys.executable)
    sys.exit(3)
print(sys.executable)
PY

without_venv=""

try() {
    local found status
    found=$("$1" -c "$CHECK" </dev/null 2>/dev/null)
    status=$?
    if [ $status -eq 0 ] && [ -n "$found" ]; then
        printf '%s\n' "$found"
        exit 0
    fi
    if [ $status -eq 3 ] && [ -z "$without_venv" ]; then without_venv=$found; fi
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    if [ -n "$without_venv" ]; then
        echo "PYTHON=$PYTHON has no venv module; install it (Debian and Ubuntu: python3-venv)." >&2
    else
        echo "PYTHON=$PYTHON is not a working CPython 3.12, 3.13 or 3.14; unset it or name another." >&2
    fi
    exit 1
fi

for name in python3.12 python3.13 python3.14 python3 python; do
    if command -v "$name" >/dev/null 2>&1; then try "$name"; fi
done
for file in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.{12,13,14}*/bin/python; do
    if [ -x "$file" ]; then try "$file"; fi
done
if command -v uv >/dev/null 2>&1; then
    file=$(UV_PYTHON_DOWNLOADS=never uv python find --system '>=3.12,<3.15' 2>/dev/null </dev/null)
    if [ -n "$file" ]; then try "$file"; fi
fi
uv_root=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}
for file in "$uv_root"/cpython-3.{12,13,14}*/bin/python3; do
    if [ -x "$file" ]; then try "$file"; fi
done

if [ -n "$without_venv" ]; then
    echo "$without_venv is new enough but has no venv module; install it (Debian and Ubuntu:" \
        "apt install python3-venv) and run this again." >&2
else
    echo "No working Python 3.12, 3.13 or 3.14 was found on the PATH, in pyenv or in uv; install one (for" \
        "example 'uv python install 3.12', 'pyenv install 3.12' or 'apt install python3.12-venv') and run" \
        "this again." >&2
fi
exit 1
