"""The notebook is valid and its code runs from the first cell to the last, in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import media
import pytest
from test_generate import write_export

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "notebook" / "features.ipynb"


def test_it_is_a_notebook_that_was_run():
    book = json.loads(NOTEBOOK.read_text())
    assert book["nbformat"] == 4 and book["nbformat_minor"] >= 5 and "kernelspec" in book["metadata"]
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("listed", [False, True])
def test_its_code_runs(tmp_path, listed):
    for name, level in (("dark", 20), ("light", 200)):
        for i in range(10):
            media.image(tmp_path / "data" / name / f"{i}.png", level=level + i)
    write_export(tmp_path / "export", roles=("encoder",))
    lines = [f"data/{name}/{i}.png {k}" for i in range(10) for k, name in enumerate(("dark", "light"))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    script = "\n".join("".join(cell["source"]) for cell in cells)
    script += "\nassert accuracy['pixels']['linear'] == 1.0, accuracy\nfigure.savefig(sys.argv[1])\n"
    (tmp_path / "script.py").write_text(script)
    data = tmp_path / ("list.csv" if listed else "data")
    env = os.environ | {"NEXTVID_EXPORT": str(tmp_path / "export"), "NEXTVID_DATA": str(data)}
    env |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "plot.png")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of 4 held out" in done.stdout and (tmp_path / "plot.png").exists()
