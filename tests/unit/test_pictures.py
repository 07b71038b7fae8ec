"""Pictures show what they say: read back from the figure's lines and bands."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from nextvid_mcore.config import ConfigError, MaskConfig
from nextvid_mcore.evaluation.pictures import loss_figure, plot_losses, running_mean, visible_map
from nextvid_mcore.masking import draw_masks, draw_visible


@pytest.mark.parametrize("mode", ["fixed", "packed"])
def test_visible_map_is_the_drawn_mask(mode: str):
    mask = MaskConfig(mode=mode)
    masks = draw_masks(mask, 8, 3, seed=0, indices=[5, 11])
    for m in (0, 1):
        seen = visible_map(masks, m, token_frames=4)
        assert seen.shape == (2, 4, 64) and not seen[:, 3].any()
        for row, index in enumerate((5, 11)):
            wanted = draw_visible(mask, 8, 0, index)[m].tolist()
            assert all(seen[row, frame].nonzero().flatten().tolist() == wanted for frame in range(3))
    with pytest.raises(ConfigError, match="no mask 2"):
        visible_map(masks, 2, token_frames=4)


def rows(count: int, **changes) -> list[dict]:
    made = []
    for step in range(1, count + 1):
        stage = "warmup" if step <= count // 4 else "stable"
        row = {"step": step, "stage": stage, "loss": 2.0 - step / count, "loss_flow": 1.0, "loss_align": 0.5}
        made.append(row | changes)
    return made


def test_loss_lines_are_the_metrics_with_gaps_where_steps_were_skipped():
    data = rows(20)
    data[6] |= {"loss": None, "loss_flow": None, "loss_align": None}
    ax = loss_figure(data).axes[0]
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert set(lines) == {"total", "flow", "alignment", "skipped"}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    drawn = lines["total"].get_ydata()
    assert math.isnan(drawn[6])
    assert np.allclose(np.delete(drawn, 6), [r["loss"] for r in data if r["loss"] is not None])
    assert lines["skipped"].get_xdata().tolist() == [7]
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "loss"


def test_stages_are_shaded_and_named_where_they_are():
    ax = loss_figure(rows(20)).axes[0]
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert bands == [(0.5, 5.5), (5.5, 20.5)]
    assert [text.get_text() for text in ax.texts] == ["warmup", "stable"]
    assert [text.xy[0] for text in ax.texts] == [3.0, 13.0]


def test_a_run_shorter_than_the_window_is_smoothed_too():
    """tools/plot_run.py takes the window of the longest run for all."""
    values = np.array([1.0, np.nan, 4.0])
    assert np.allclose(running_mean(values, 9), 2.5)
    assert np.allclose(running_mean(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])


def test_long_runs_are_smoothed_round_each_step():
    data = rows(400)
    data[200] |= {"loss": None}
    smooth = {line.get_label(): line.get_ydata() for line in loss_figure(data).axes[0].get_lines()}
    total = smooth["total (mean of 9)"]
    assert np.allclose(total[100], data[100]["loss"]) and not np.isnan(total).any()
    assert np.allclose(smooth["flow (mean of 9)"], 1.0)


def test_plot_losses_writes_a_picture_and_refuses_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows(3)) + '{"step": 4, "lo'
    )
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png")
    with Image.open(tmp_path / "plots" / "loss.png") as picture:
        assert picture.format == "PNG" and picture.size == (960, 540)
        assert np.asarray(picture.convert("L")).std() > 10
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no step"):
        plot_losses(tmp_path / "empty.jsonl", tmp_path / "none.png")
