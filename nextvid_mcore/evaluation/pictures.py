"""Pictures of a run: what was seen and what was generated (the two ends of Figure 2), and its losses.

Figures are made without pyplot: nothing here needs a display or changes a global setting.
"""

from __future__ import annotations

import math
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
from nextvid_mcore.targets import Target
from nextvid_mcore.training import metrics

HIDDEN = torch.tensor([-0.75, -0.6, -0.3]).reshape(3, 1, 1, 1)  # hidden patches, dark blue: no black, no grey
LABEL = {"ha": "center", "va": "center", "fontsize": 8}
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


@torch.no_grad()
def prediction_grid(
    target: Target,
    video: Tensor,
    truth: Tensor,
    predicted: Tensor,
    visible: Tensor,
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
) -> None:
    """Write a PNG with three rows a clip: the video, what the encoder sees, the generated next frames.

    A target that loses detail (a VAE) gets a fourth: its own reconstruction, the best that generation
    can reach. Columns are token frames; each shows the first video frame of its tubelet.

    Args:
        video: [B, 3, T, H, W] in [-1, 1].
        truth: the target's latents of it, [B, t, n, C].
        predicted: generated latents of the frames 1 .. t-1, [B, p, n, C].
        visible: bool [B, t, n], True where the student sees a token (see `visible_map`).
        titles: a name per clip.
        columns: at most so many token frames are drawn, evenly spaced.
    """
    B, t, n, C = truth.shape
    T, side = video.shape[2], math.isqrt(n)
    require(
        predicted.shape == (B, t - 1, n, C) and visible.shape == (B, t, n),
        f"for latents {tuple(truth.shape)} the prediction must be {(B, t - 1, n, C)} and the visible tokens "
        f"{(B, t, n)}, got {tuple(predicted.shape)} and {tuple(visible.shape)}",
    )
    require(
        len(video) == B and T % t == 0 and side**2 == n,
        f"video {tuple(video.shape)} and latents {tuple(truth.shape)} are not of the same clips",
    )
    video = video.float().cpu()
    firsts = slice(0, None, T // t)
    original = video[:, :, firsts]  # [B, 3, t, H, W]
    rebuilt = target.decode(truth).cpu()[:, :, firsts]
    generated = target.decode(predicted).cpu()[:, :, firsts]
    patch = video.shape[-1] // side
    seen = visible.cpu().reshape(B, 1, t, side, side)
    seen = seen.repeat_interleave(patch, 3).repeat_interleave(patch, 4)
    rows = {"video": original, "seen by\nthe encoder": torch.where(seen, original, HIDDEN)}
    if not torch.allclose(rebuilt, original, atol=1 / 255):
        rows["video through\nthe target"] = rebuilt
    rows["generated"] = torch.cat([torch.full_like(original[:, :, :1], torch.nan), generated], dim=2)

    shown = np.unique(np.linspace(0, t - 1, min(columns, t)).round().astype(int))
    figure = Figure(
        figsize=(0.6 + 1.3 * len(shown), 0.4 + B * (0.5 + 1.3 * len(rows))), dpi=120, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.01, wspace=0.01)
    figure.suptitle("Next frames generated from what was seen before", fontsize=11)
    for clip, part in enumerate(figure.subfigures(B, 1, squeeze=False).flat):
        part.suptitle(titles[clip] if titles else f"clip {clip}", fontsize=9, fontweight="bold")
        axes = part.subplots(len(rows), len(shown), squeeze=False)
        for line, (name, frames) in enumerate(rows.items()):
            for ax, frame in zip(axes[line], shown, strict=True):
                _draw_frame(ax, frames[clip, :, frame])
            axes[line, 0].set_ylabel(name, fontsize=8)
        if not visible[clip, -1].any():
            axes[1, -1].text(0.5, 0.5, "not read", transform=axes[1, -1].transAxes, **LABEL, color="white")
        for ax, frame in zip(axes[0], shown, strict=True):
            ax.set_title(f"frame {frame * (T // t)}", fontsize=8)
    _save(figure, path)


def _draw_frame(ax: Axes, frame: Tensor) -> None:
    """One frame [3, H, W] in [-1, 1]; all nan: there is none."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if frame.isnan().all():
        ax.set_box_aspect(1)
        ax.text(0.5, 0.5, "not predicted", **LABEL, color="#888888")
    else:
        ax.imshow(((frame + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")


def plot_losses(metrics_jsonl: str | Path, path: str | Path) -> None:
    """Write `loss.png`: the losses of a run's metrics.jsonl over its steps, the stages shaded."""
    rows = metrics.read(Path(metrics_jsonl))
    require(len(rows) > 0, f"{metrics_jsonl} holds no step to draw")
    _save(loss_figure(rows), path)


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
            values = _running_mean(values, window)
            name += f" (mean of {window})"
        marker = "o" if len(values) <= 3 else None
        ax.plot(steps, values, color=colour, linewidth=1.6, label=name, marker=marker, markersize=4)
    lost = steps[[row.get("loss") is None for row in rows]]
    if len(lost):
        height = ax.get_xaxis_transform()
        ax.plot(lost, np.full(len(lost), 0.02), "|", color="#c00000", transform=height, label="skipped")


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses of metrics rows, the stages shaded."""
    steps = np.array([row["step"] for row in rows])
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    ax = figure.subplots()
    draw_losses(ax, rows)
    _shade_stages(ax, [str(row.get("stage", "")) for row in rows], steps)
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.set_title("Training loss", pad=20)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    return figure


def _shade_stages(ax: Axes, stages: list[str], steps: np.ndarray) -> None:
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


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the `window` (odd) nearest each place; nan where there is none."""
    finite = np.isfinite(values)
    box = np.ones(window)
    sums, counts = (np.convolve(part, box, mode="same") for part in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
