"""metrics.jsonl, the wandb sink and the progress display."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
import types

import pytest
import torch

from nextvid_mcore.config import ConfigError, WandbConfig
from nextvid_mcore.training import wandb_sink
from nextvid_mcore.training.metrics import MetricsFile, read
from nextvid_mcore.training.progress import Progress
from nextvid_mcore.training.wandb_sink import WandbSink


def refuse(name: str):
    raise AssertionError(f"not strict JSON: {name}")


def test_every_line_is_strict_json(tmp_path):
    log = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    log.write(
        {"step": 1, "loss": float("nan"), "grad_norm": torch.tensor(float("inf")), "by": [1, float("-inf")]}
    )
    log.write({"step": 2, "loss": torch.tensor(0.5), "stage": "warmup", "bad": [["a.mp4", "torn"]]})
    rows = [
        json.loads(x, parse_constant=refuse) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0] == {"step": 1, "loss": None, "grad_norm": None, "by": [1, None]}
    assert rows[1] == {"step": 2, "loss": 0.5, "stage": "warmup", "bad": [["a.mp4", "torn"]]}


def test_resume_cuts_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, step=0)
    for step in range(1, 6):
        log.write({"step": step, "loss": step / 10})
    log.close()
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + '{"step": 6, "lo')  # killed while writing
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5]
    log = MetricsFile(path, step=3)
    assert path.read_text() == "".join(whole[:3])
    log.write({"step": 4, "loss": 0.4})
    log.close()
    assert path.read_text() == "".join(whole[:4])
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        MetricsFile(path, step=1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", [b'{"st', b"7", b"{}", b'["step"]', b'{"step": "\xff'])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(
        ConfigError, match="line 2 is not JSON with a step: .*; mend it, or move the file away"
    ):
        MetricsFile(path, step=3)


class FakeWandb(types.ModuleType):
    """Stands at wandb's place: what a run was told, and a network that may hang."""

    def __init__(self, hang: threading.Event | None = None, error: Exception | None = None):
        super().__init__("wandb")
        self.rows, self.asked, self.finished = [], {}, False
        self.hang, self.error = hang, error
        self.Settings = dict

    def init(self, **asked):
        self.asked = asked
        if self.hang is not None:
            self.hang.wait(30)
        if self.error is not None:
            raise self.error
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished = True


def test_wandb_gets_every_row_offline_under_one_id(tmp_path, monkeypatch):
    ids = []
    for _ in range(2):  # the second is a resumed run
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        sink = WandbSink(WandbConfig(enabled=True), tmp_path / "run", {"recipe": "tiny"}, pytest.fail)
        for step in (1, 2, 3):
            sink.write({"step": step, "loss": 0.1})
        sink.close()
        assert [step for step, _ in fake.rows] == [1, 2, 3] and fake.finished
        assert fake.asked["mode"] == "offline"
        ids.append(fake.asked["id"])
    assert ids[0] == ids[1]


def test_wandb_never_blocks_and_fails_once(tmp_path, monkeypatch):
    said: list[str] = []
    gate = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(hang=gate))
    monkeypatch.setattr(wandb_sink, "CLOSE_TIMEOUT", 0.05)
    sink = WandbSink(WandbConfig(enabled=True), tmp_path, {}, said.append, capacity=2)
    for step in range(100):  # returns although init hangs
        sink.write({"step": step})
    sink.close()
    assert len(said) == 1 and "wandb is off" in said[0]
    gate.set()

    said.clear()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error=RuntimeError("no network")))
    sink = WandbSink(WandbConfig(enabled=True), tmp_path, {}, said.append)
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    sink.write({"step": 1})
    sink.close()
    assert said == ["wandb is off for the rest of this run: RuntimeError: no network"]


def test_wandb_is_not_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    sink = WandbSink(WandbConfig(), tmp_path, {}, pytest.fail)
    sink.write({"step": 1})
    sink.close()
    assert list(tmp_path.iterdir()) == []


ROW = dict(
    step=4,
    stage="warmup",
    loss=0.25,
    loss_flow=None,
    loss_align=float("nan"),
    clips_per_s=3.0,
    lr=1e-4,
    skipped=0,
)


def test_progress_without_a_terminal_is_a_line_every_few_steps():
    stream = io.StringIO()
    progress = Progress(total=5, step=0, log_every=2, enabled=True, rank=0, stream=stream)
    for step in range(1, 6):
        progress.step(ROW | {"step": step})
    progress.say("saved")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["2/5", "4/5", "5/5"]
    assert (
        "loss 0.25" in lines[0]
        and "flow off" in lines[0]
        and "align nan" in lines[0]
        and "lr 1.00e-04" in lines[0]
    )
    assert lines[-1] == "saved" and "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_a_bar_and_other_ranks_are_silent():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for rank in (0, 1):
        stream = Terminal()
        progress = Progress(total=8, step=3, log_every=1, enabled=True, rank=rank, stream=stream)
        progress.step(ROW)
        progress.say("saved")
        progress.close()
        text = stream.getvalue()
        assert text == "" if rank else ("4/8" in text and "warmup" in text and "saved" in text)


def test_progress_says_that_predictions_became_a_constant():
    stream = io.StringIO()
    progress = Progress(total=300, step=0, log_every=1, enabled=False, rank=0, stream=stream)
    for step in range(1, 201):
        progress.step(ROW | {"step": step, "z_var": 1e-6 if step > 20 else 0.1})
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("step 120: for 100 steps the predictions have been one vector")
