r"""A picture of a placement: its seats and ranks, what crosses between them, and how busy each is.

    python tools/draw_placement.py docs/placement.svg vit_g --world-size 8 \
        --parallel.placement two-groups --parallel.generator.data 4 --parallel.reference generator

Everything in it comes from the plan that `--dry-run` prints for the same settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402

from nextvid_mcore import cli, flops  # noqa: E402
from nextvid_mcore.config import ConfigError, RunConfig  # noqa: E402
from nextvid_mcore.evaluation.results import picture_file  # noqa: E402
from nextvid_mcore.pretrain import quiet  # noqa: E402

quiet()
from nextvid_mcore.parallel.balance import balance  # noqa: E402
from nextvid_mcore.parallel.placement import Placement, Seat, resolve_placement, settled  # noqa: E402
from nextvid_mcore.parallel.seating import crossings, readable  # noqa: E402

COLOURS = {"student": "#4477aa", "reference": "#88bbdd", "predictor": "#ccbb44", "decoder": "#ee7733"}
CELL, GAP, BOX, HEIGHT = 0.42, 3.4, 4.4, 4.6  # sizes in inches
CELLS_A_ROW = 9


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0].startswith("-"):
        asked = argv[:1] in (["-h"], ["--help"])
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        picture_file(Path(argv[0]), "the first argument")
        config, options = cli.parse([*argv[1:], "--dry-run"])
        config, _ = settled(config, options.world_size)
        draw(config, resolve_placement(config, options.world_size), Path(argv[0]))
    except (ConfigError, cli.Help) as error:
        print(f"draw_placement: {error}", file=sys.stderr)
        return 2
    return 0


def draw(config: RunConfig, placement: Placement, path: Path) -> None:
    """Write the picture; its format is the file name's."""
    seats = placement.seats
    bars = 0.4 + 0.2 * len(config.stages) * len(balance(config, placement, config.stages[0]).links)
    width = 1.2 + len(seats) * BOX + (len(seats) - 1) * GAP
    matplotlib.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "placement"})
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(width, HEIGHT + 0.6 + bars), gridspec_kw={"height_ratios": [HEIGHT + 0.6, bars]}
    )
    top.set_xlim(0, width), top.set_ylim(-0.6, HEIGHT), top.set_axis_off()
    left = {seat.name: 0.6 + i * (BOX + GAP) for i, seat in enumerate(seats)}
    for seat in seats:
        _seat(top, config, placement, seat, left[seat.name])
    for each, y in zip(crossings(config, placement, config.stages[0]), (2.6, 2.6, 1.0), strict=False):
        if each.per_step:
            y = 1.0
        start, end = left[each.source] + BOX, left[each.target]
        amount = f"{readable(each.forward)} {'a step' if each.per_step else 'a clip'}"
        _arrow(top, start, end, y, f"{each.what}\n{amount}", "--" if each.per_step else "-")
        if each.backward:
            _arrow(top, end, start, y - 0.35, f"gradient, {readable(each.backward)}", "-", below=True)
    _bars(bottom, config, placement)
    top.set_title(
        f"{config.recipe} on {placement.world} ranks, {placement.kind}; masks, tau and noise never cross: "
        "every seat draws them from (seed, sample index)",
        loc="left",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _seat(axes: Axes, config: RunConfig, placement: Placement, seat: Seat, x: float) -> None:
    axes.add_patch(
        FancyBboxPatch((x, 0), BOX, 3.6, boxstyle="round,pad=0.08", facecolor="#f7f7f7", edgecolor="#444444")
    )
    layout = seat.layout
    axes.text(x + 0.1, 3.3, seat.name, weight="bold", fontsize=12)
    axes.text(x + 0.1, 3.02, f"tensor {layout.tensor} x data {layout.data} x pipeline {layout.pipeline}")
    clips = placement.clips(seat, config.micro_batch(config.stages[0]))
    axes.text(x + 0.1, 2.76, f"{clips} clips of a micro-batch in each replica, stage {config.stages[0].name}")
    count = flops.parameters(config.model, flops.target_channels(config))
    sizes = {"student": count.student, "reference": count.encoder}
    sizes |= {"predictor": count.predictor, "decoder": count.decoder}
    entries = [(role, f"{role}, {sizes[role] / 1e6:,.0f}M") for role in seat.roles]
    if "student" in seat.roles and "reference" not in seat.roles:
        entries.append(("reference", "its EMA, for the reference"))
    for i, (role, text) in enumerate(entries):
        y = 2.35 - 0.3 * i
        axes.add_patch(Rectangle((x + 0.12, y - 0.03), 0.2, 0.2, color=COLOURS[role]))
        axes.text(x + 0.42, y, text)
    shown = list(seat.ranks)[: 2 * CELLS_A_ROW]
    for i, rank in enumerate(shown):
        cx, cy = x + 0.12 + CELL * 1.1 * (i % CELLS_A_ROW), 0.62 - CELL * 1.15 * (i // CELLS_A_ROW)
        axes.add_patch(Rectangle((cx, cy), CELL, CELL, facecolor="white", edgecolor="#666666"))
        more = i == len(shown) - 1 and len(shown) < len(seat.ranks)
        axes.text(cx + CELL / 2, cy + CELL / 2, "..." if more else str(rank), ha="center", va="center")
    if seat.sees_video:
        axes.annotate(
            "video", (x + BOX / 2, 3.7), (x + BOX / 2, 4.25), ha="center", arrowprops={"arrowstyle": "-|>"}
        )
    losses = [
        name
        for name, role, on in (
            ("alignment loss", "predictor", config.model.align),
            ("flow loss", "decoder", config.model.generate),
        )
        if role in seat.roles and on
    ]
    if losses:
        axes.text(x + BOX / 2, -0.18, " and ".join(losses), ha="center", va="top")


def _arrow(
    axes: Axes, start: float, end: float, y: float, text: str, style: str, below: bool = False
) -> None:
    inset = 0.14 if end > start else -0.14
    axes.add_patch(
        FancyArrowPatch(
            (start + inset, y), (end - inset, y), arrowstyle="-|>", mutation_scale=14, linestyle=style
        )
    )
    axes.text(
        (start + end) / 2, y + (-0.08 if below else 0.08), text, ha="center", va="top" if below else "bottom"
    )


def _bars(axes: Axes, config: RunConfig, placement: Placement) -> None:
    """How much of a step each link of the chain works, by executed FLOPs, in every schedule stage."""
    steps = {stage.name: balance(config, placement, stage) for stage in config.stages}
    names = [
        link.name if link.stage is None else f"{link.name} {link.stage}"
        for link in next(iter(steps.values())).links
    ]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        for j, step in enumerate(steps.values()):
            busy, y = 1 - step.waits(step.links[i]), j + height * i
            axes.barh(y, busy, height * 0.9, color="#9db7d5")
            axes.barh(y, 1 - busy, height * 0.9, left=busy, color="#eeeeee")
            axes.text(0.01, y, f"{name}: {busy:.0%} busy", va="center", fontsize=8)
    centre = height * (len(names) - 1) / 2
    axes.set_yticks([j + centre for j in range(len(steps))], list(steps))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        "a step, by executed FLOPs with the target network: blue works, grey waits", loc="left", fontsize=10
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
