"""scripts/find_python.sh on made-up machines: shims that fail, old versions, pyenv, uv, nothing at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "find_python.sh"
FAIL = "#!/bin/sh\necho 'pyenv: python: command not found' >&2\nexit 127\n"
# Real interpreters, told to be another: what the script asks of one is answered by Python itself.
LIE = """#!/bin/sh
shift
exec "{real}" -c "import sys, sysconfig
{lie}
exec(sys.argv[1])" "$1"
"""
OLD = LIE.format(real=sys.executable, lie="sys.version_info = (3, 11, 7)")
NEWER = LIE.format(real=sys.executable, lie="sys.version_info = (3, 15, 0)")
PYPY = LIE.format(real=sys.executable, lie="sys.implementation.name = 'pypy'")
FREE_THREADED = LIE.format(real=sys.executable, lie="sysconfig.get_config_var = lambda name: 1")
NO_VENV = LIE.format(real=sys.executable, lie="sys.modules['ensurepip'] = None")
GOOD = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'


class Machine:
    """A folder with a PATH and a home of its own, and nothing else of the real machine but sh and bash."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.home = root, root / "bin", root / "home"
        self.bin.mkdir()
        self.home.mkdir()
        for tool in ("bash", "sh"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def put(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def find(self, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": str(self.home), **variables}
        return subprocess.run(
            [str(self.bin / "bash"), str(SCRIPT)], env=env, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def assert_found(result: subprocess.CompletedProcess[str]) -> None:
    """The script printed an interpreter that runs, alone on its line."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    assert os.path.samefile(result.stdout.strip(), sys.executable)


def assert_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The script failed with one line on stderr that holds `words`."""
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_first_good_one_on_the_path(machine: Machine) -> None:
    machine.put("bin/python3.12", GOOD)
    machine.put("bin/python3", FAIL)
    assert_found(machine.find())


@pytest.mark.parametrize("bad", [FAIL, OLD, NEWER, PYPY, FREE_THREADED, NO_VENV])
def test_a_bad_candidate_is_passed_over(machine: Machine, bad: str) -> None:
    machine.put("bin/python3.12", bad)
    machine.put("bin/python3.13", bad)
    machine.put("bin/python3.14", bad)
    machine.put("bin/python3", bad)
    machine.put("bin/python", GOOD)
    assert_found(machine.find())


@pytest.mark.parametrize("root", [None, "elsewhere/pyenv"])
def test_pyenv_behind_a_failing_shim(machine: Machine, root: str | None) -> None:
    machine.put("bin/python3.12", FAIL)
    machine.put("bin/python3", OLD)
    where = root or "home/.pyenv"
    machine.put(f"{where}/versions/3.11.7/bin/python", FAIL)
    machine.put(f"{where}/versions/3.13.1/bin/python", GOOD)
    assert_found(machine.find(**({"PYENV_ROOT": str(machine.root / root)} if root else {})))


def test_uv_is_asked(machine: Machine) -> None:
    interpreter = machine.put("somewhere/python3", GOOD)
    machine.put("bin/uv", f'#!/bin/sh\n[ "$1 $2" = "python find" ] && echo "{interpreter}"\n')
    assert_found(machine.find())


@pytest.mark.parametrize("variable", [None, "UV_PYTHON_INSTALL_DIR"])
def test_uvs_folder_without_uv(machine: Machine, variable: str | None) -> None:
    where = "uv-pythons" if variable else "home/.local/share/uv/python"
    machine.put(f"{where}/cpython-3.14.0-linux-x86_64-gnu/bin/python3", GOOD)
    assert_found(machine.find(**({variable: str(machine.root / where)} if variable else {})))


def test_nothing_there(machine: Machine) -> None:
    machine.put("bin/python3", OLD)
    machine.put("bin/uv", "#!/bin/sh\nexit 2\n")
    assert_sentence(machine.find(), "3.12", "uv python install", "apt install python3.12-venv")


def test_only_venv_is_missing(machine: Machine) -> None:
    machine.put("bin/python3", NO_VENV)
    assert_sentence(machine.find(), "no venv module", "apt install python3-venv")


def test_a_named_python(machine: Machine) -> None:
    machine.put("bin/python3.12", FAIL)
    named = machine.put("opt/python", GOOD)
    assert_found(machine.find(PYTHON=str(named)))
    old = machine.put("opt/old", OLD)
    machine.put("bin/python3", GOOD)
    assert_sentence(machine.find(PYTHON=str(old)), f"PYTHON={old}")
    assert_sentence(machine.find(PYTHON="/does/not/exist"), "PYTHON=/does/not/exist")
