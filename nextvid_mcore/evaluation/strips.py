"""Rows of clips side by side: as a PNG (frames along the row), a GIF, or an MP4 (all rows play together).

GIFs are written by Pillow. MP4 needs PyAV (`pip install av`): the maintained binding of FFmpeg's own
libraries, whose wheels carry an h264 encoder; it is asked for by name and never fallen back from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.evaluation.pictures import save

INK, PAPER, PALE = (34, 34, 34), (255, 255, 255), (226, 226, 226)
GAP, LINE = 8, 20  # pixels between panels, of a line of text


class Panel(NamedTuple):
    """A named clip, [3, T, H, W] in [-1, 1]; frames of nan are not there, and `missing` says why."""

    name: str
    video: Tensor
    missing: str = "not predicted"


class Strip(NamedTuple):
    """Panels of equal size and length that belong together."""

    title: str
    panels: Sequence[Panel]


def _check(strips: Sequence[Strip]) -> tuple[int, int, int, int]:
    require(len(strips) > 0 and all(strip.panels for strip in strips), "there is nothing to draw")
    shapes = {tuple(panel.video.shape) for strip in strips for panel in strip.panels}
    require(len(shapes) == 1, f"clips drawn side by side must have one shape, got {sorted(shapes)}")
    return next(iter(shapes))


def write_png(
    strips: Sequence[Strip],
    path: str | Path,
    title: str,
    step: int = 1,
    columns: int = 8,
    word: str = "frame",
) -> None:
    """A line of frames for each panel: every `step`th one, evenly thinned to at most `columns`.

    word: what a column is.
    """
    _, T, height, width = _check(strips)
    shown = np.arange(0, T, step)
    shown = shown[np.unique(np.linspace(0, len(shown) - 1, min(columns, len(shown))).round().astype(int))]
    lines = [len(strip.panels) for strip in strips]
    cell = 1.25
    figure = Figure(
        figsize=(1.3 + cell * len(shown), 0.45 + sum(0.5 + cell * height / width * n for n in lines)),
        dpi=120,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.01, wspace=0.01)
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=[0.4 + n for n in lines]).flat
    for part, strip in zip(parts, strips, strict=True):
        part.suptitle(strip.title, fontsize=9, fontweight="bold")
        axes = part.subplots(len(strip.panels), len(shown), squeeze=False)
        for line, panel in zip(axes, strip.panels, strict=True):
            for ax, frame in zip(line, shown, strict=True):
                _draw_frame(ax, panel.video[:, frame].float().cpu(), panel.missing)
            line[0].set_ylabel(panel.name, fontsize=8)
        for ax, frame in zip(axes[0], shown, strict=True):
            ax.set_title(f"{word} {frame}", fontsize=8)
    save(figure, path)


def _draw_frame(ax: Axes, frame: Tensor, missing: str) -> None:
    """One frame [3, H, W]; all nan: the word `missing`."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if frame.isnan().all():
        ax.set_box_aspect(1)
        ax.text(0.5, 0.5, missing, ha="center", va="center", fontsize=8, color="#888888")
    else:
        ax.imshow(((frame + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")


def film(strips: Sequence[Strip], least: int = 128) -> np.ndarray:
    """All panels in a grid, a strip a row, played together: uint8 [T, height, width, 3].

    Panels narrower than `least` pixels are enlarged by a whole factor, pixel by pixel.
    """
    _, T, height, width = _check(strips)
    scale = max(1, math.ceil(least / width))
    h, w = height * scale, width * scale
    columns = max(len(strip.panels) for strip in strips)
    size = (GAP + columns * (w + GAP), GAP + len(strips) * (h + 2 * LINE + GAP))
    size = tuple(x + x % 2 for x in size)  # h264 wants even sizes
    background = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(background)
    plain = ImageFont.load_default(13)
    places = []
    for row, strip in enumerate(strips):
        top = GAP + row * (h + 2 * LINE + GAP)
        draw.text((GAP, top), strip.title, INK, font=plain, stroke_width=0.3, stroke_fill=INK)
        for column, panel in enumerate(strip.panels):
            left = GAP + column * (w + GAP)
            name = panel.name.replace("\n", " ")
            while draw.textlength(name, font=plain) > w and len(name) > 4:
                name = name.removesuffix("...")[:-1].rstrip() + "..."
            draw.text((left, top + LINE), name, (110, 110, 110), font=plain)
            places.append((panel.video, top + 2 * LINE, left))
    out = np.repeat(np.asarray(background)[None], T, axis=0)
    for video, top, left in places:
        missing = video.isnan().flatten(2).any(2).any(0)  # [T]
        pixels = ((video.float().nan_to_num(0.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = (
            pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(1, 2, 3, 0).cpu().numpy()
        )
        pixels[missing.cpu().numpy()] = PALE
        out[:, top : top + h, left : left + w] = pixels
    return out


def write_gif(frames: np.ndarray, path: str | Path, fps: float) -> None:
    """An endless GIF of uint8 [T, height, width, 3]."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # One palette for all frames, so that still areas don't flicker.
    sample = frames[:: max(1, len(frames) // 8)]
    palette = Image.fromarray(np.concatenate(list(sample), axis=0)).quantize(256, Image.Quantize.MEDIANCUT)
    pages = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    duration = max(20, round(1000 / fps))
    pages[0].save(
        path, save_all=True, append_images=pages[1:], duration=duration, loop=0, disposal=1, optimize=False
    )


def check_mp4() -> None:
    """Raise ConfigError where PyAV is missing."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"MP4 needs PyAV ({error}): pip install av, or leave --mp4 out") from None


def write_mp4(frames: np.ndarray, path: str | Path, fps: float) -> None:
    """An h264 file of uint8 [T, height, width, 3], even height and width."""
    check_mp4()
    import av

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
