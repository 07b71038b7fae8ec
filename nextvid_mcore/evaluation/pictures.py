"""Pictures of a run: which patches the student saw, and the losses.

Figures are made without pyplot: nothing here needs a display or changes a global setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nextvid_mcore.config import require
from nextvid_mcore.masking import ClipMasks
from nextvid_mcore.training import metrics

HIDDEN = torch.tensor([-0.75, -0.6, -0.3]).reshape(3, 1, 1, 1)  # hidden patches, dark blue: no black, no grey
LOSSES = {
    "loss": ("total", "#222222"),
    "loss_flow": ("flow", "#1f77b4"),
    "loss_align": ("alignment", "#d9730d"),
}


def visible_map(masks: ClipMasks, mask: int, token_frames: int) -> Tensor:
    """Which tokens the student sees under mask number `mask`: bool [B, token_frames, n]."""
    segments = [segment for segment in masks.segments if segment.mask == mask]
    require(len(segments) > 0, f"there is no mask {mask} among {[s.mask for s in masks.segments]}")
    seen = torch.zeros(masks.clips, token_frames * masks.tokens_per_frame, dtype=torch.bool)
    for segment in segments:
        clips = torch.arange(masks.clips)[segment.clips].reshape(-1, 1)
        seen[clips, masks.of(segment).cpu()] = True
    return seen.unflatten(1, (token_frames, -1))


def plot_losses(metrics_jsonl: str | Path, path: str | Path) -> None:
    """Write `loss.png`: the losses of a run's metrics.jsonl over its steps, the stages shaded."""
    rows = metrics.read(Path(metrics_jsonl))
    require(len(rows) > 0, f"{metrics_jsonl} holds no step to draw")
    save(loss_figure(rows), path)


def draw_losses(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The losses of metrics rows as lines. Steps skipped as not finite (null) are gaps with a red mark."""
    steps = np.array([row["step"] for row in rows])
    for key, (name, colour) in LOSSES.items():
        values = np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)
        if np.isnan(values).all():
            continue
        window = len(values) // 100 * 2 + 1
        if window > 1:  # a long run: its own values pale, their running mean on top
            ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = running_mean(values, window)
            name += f" (mean of {window})"
        marker = "o" if len(values) <= 3 else None
        ax.plot(steps, values, color=colour, linewidth=1.6, label=name, marker=marker, markersize=4)
    mark_lost(ax, steps, [row.get("loss") for row in rows], "#c00000", "skipped")


def mark_lost(
    ax: Axes, steps: np.ndarray, losses: Sequence[float | None], colour: object, label: str | None = None
) -> None:
    """Ticks at the bottom, at the steps whose loss is null or not finite."""
    lost = steps[[value is None or not np.isfinite(value) for value in losses]]
    drawn = any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in ax.lines)
    if len(lost):
        height = ax.get_xaxis_transform()
        ax.plot(lost, np.full(len(lost), 0.02), "|", color=colour, transform=height, label=label)
    if len(lost) == len(steps) and not drawn:
        ax.text(0.5, 0.5, "no finite loss", transform=ax.transAxes, ha="center", color="#888888")


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses of metrics rows, the stages shaded."""
    steps = np.array([row["step"] for row in rows])
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    ax = figure.subplots()
    draw_losses(ax, rows)
    shade_stages(ax, [str(row.get("stage", "")) for row in rows], steps)
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.set_title("Training loss", pad=20)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    plain(ax)
    ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    return figure


def plain(ax: Axes, grid: str = "y") -> None:
    """No frame but the axes, and pale lines behind what is drawn, along `grid`: x, y or both."""
    ax.grid(axis=grid, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def shade_stages(ax: Axes, stages: list[str], steps: np.ndarray) -> None:
    """A band for each stage, every other one grey, with its name above the axes."""
    start = 0
    edges = [steps[0] - 0.5, *(steps[1:] - 0.5), steps[-1] + 0.5]
    for number, (name, members) in enumerate(groupby(stages)):
        stop = start + len(list(members))
        left, right = edges[start], edges[stop]
        ax.axvspan(left, right, color="#f1f1f1" if number % 2 == 0 else "#ffffff", zorder=0, linewidth=0)
        narrow = right - left < 0.1 * (edges[-1] - edges[0])  # then its name must not leave the axes
        place, align = (left + right) / 2, "center"
        if narrow and stop == len(steps):
            place, align = right, "right"
        elif narrow and start == 0:
            place, align = left, "left"
        ax.annotate(
            name,
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha=align,
            fontsize=8,
            color="#555555",
        )
        start = stop
    ax.set_xlim(edges[0], edges[-1])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the `window` (odd) nearest each place; nan where there is none."""
    finite = np.isfinite(values)
    box, middle = np.ones(window), slice(window // 2, window // 2 + len(values))  # there may be fewer values
    sums, counts = (np.convolve(part, box)[middle] for part in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
