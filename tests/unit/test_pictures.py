"""Pictures show what they say: read back from the PNG, and from the figure's lines and bands."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, MaskConfig
from nextvid_mcore.evaluation.pictures import loss_figure, plot_losses, prediction_grid, visible_map
from nextvid_mcore.masking import draw_masks, draw_visible
from nextvid_mcore.targets import build_target

RED, GREEN, BLUE, HIDDEN = (255, 0, 0), (0, 255, 0), (0, 0, 255), (32, 51, 89)


def flat(colour: tuple[int, int, int], clips: int, frames: int) -> torch.Tensor:
    return (torch.tensor(colour) / 127.5 - 1).reshape(1, 3, 1, 1, 1).expand(clips, 3, frames, 64, 64)


def areas(path) -> dict[tuple[int, int, int], int]:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return {c: int((np.abs(pixels - c).max(-1) <= 1).sum()) for c in (RED, GREEN, BLUE, HIDDEN)}


def draw(path, rebuilt: tuple[int, int, int] = RED, clips: int = 2, frames: int = 8, **options) -> None:
    """Red clips of which the student sees the upper half (not the last frame); green is generated."""
    target = build_target(recipes.get("tiny"), "cpu", torch.float32)
    visible = torch.zeros(clips, frames // 2, 8, 8, dtype=torch.bool)
    visible[:, :-1, :4] = True
    prediction_grid(
        target,
        flat(RED, clips, frames),
        target.latents(flat(rebuilt, clips, frames)),
        target.latents(flat(GREEN, clips, frames - 2)),
        visible.flatten(2),
        path,
        **options,
    )


def test_grid_areas_are_those_of_the_frames_and_masks(tmp_path):
    draw(tmp_path / "grids" / "grid.png")
    found = areas(tmp_path / "grids" / "grid.png")
    cell = found[GREEN] / 6  # 2 clips, 3 predicted frames
    assert cell > 80**2 and found[BLUE] == 0
    assert found[RED] / cell == pytest.approx(2 * (4 + 1.5), rel=0.03)  # the video, half of 3 seen frames
    assert found[HIDDEN] / cell == pytest.approx(2 * (1.5 + 1), rel=0.05)  # the other half, the last frame


def test_a_target_that_loses_detail_gets_a_row_of_its_own(tmp_path):
    draw(tmp_path / "grid.png", rebuilt=BLUE)
    found = areas(tmp_path / "grid.png")
    assert found[BLUE] / (found[GREEN] / 6) == pytest.approx(8, rel=0.03)


def test_long_clips_are_thinned(tmp_path):
    draw(tmp_path / "all.png", clips=1, frames=16, columns=8)
    draw(tmp_path / "some.png", clips=1, frames=16, columns=4)
    widths = [Image.open(tmp_path / name).width for name in ("all.png", "some.png")]
    assert widths[0] > 1.7 * widths[1]


def test_grid_refuses_tensors_that_do_not_fit(tmp_path):
    target = build_target(recipes.get("tiny"), "cpu", torch.float32)
    video = flat(RED, 1, 8)
    latents, visible = target.latents(video), torch.ones(1, 4, 64, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"\(1, 3, 64, 384\)"):
        prediction_grid(target, video, latents, latents, visible, tmp_path / "grid.png")
    with pytest.raises(ConfigError, match="same clips"):
        prediction_grid(target, video[:, :, :7], latents, latents[:, 1:], visible, tmp_path / "grid.png")


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
