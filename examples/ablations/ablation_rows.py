"""The runs of docs/results.md, ordered by what they teach: which row, which seed, which settings.

`Run.key` is a digest of every setting that is not a default: a result counts only for exactly the run that
it belongs to, and rows that are the same run under two names share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvid_mcore import recipes
from nextvid_mcore.config import MOVING_DIGITS, RunConfig, TransformerShape, require
from nextvid_mcore.evaluation.presets import ProbeConfig, preset
from nextvid_mcore.recipes import digits

REAL = "real-clips:"  # before the path of a file of real_clips.py
REAL_FRAMES = 8
KINDS = ("pretrain", "random", "pixels", "supervised")
WIDE = 0.06  # deviation of initial weights that makes most untrained encoders tell digits better


@dataclass(frozen=True)
class Budget:
    """How long every pretraining is, and on how many clips it is probed."""

    steps: int = 1200
    batch: int = 64
    peak: float = digits.PEAK
    image: int = 32
    patch: int = 8
    side: int = 22  # of the digits in pixels; 0: 28 / 64 of the frame, as MNIST's own are
    frames: int = 16
    peak_flow: float = digits.PEAK_FLOW  # learning rate of the decoder
    other: str = "192x2"  # predictor's and decoder's width and depth
    target: str = "pixels"  # or vae: what every run but Table 3's generates
    vae: str = ""  # folder of tools/train_vae.py, whose latents those are
    real: str = ""  # file of real_clips.py
    init_std: float = 0.02
    pixel_scale: float = digits.PIXEL_SCALE
    ema: float = digits.EMA
    flow: float = 0.5  # weights of the losses
    align: float = 1.0
    precision: str = "bf16"
    compile: int = 0  # 1: the step is a third cheaper, after most of a minute that many processes share
    probe_train: int = 4000
    probe_test: int = 2000
    probe_epochs: int = 12


@dataclass(frozen=True)
class Run:
    """One run of the queue."""

    row: str
    seed: int
    kind: str
    config: RunConfig
    probe: ProbeConfig
    until: float | None = None  # train to this time.time(), and run through the schedule by the clock

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"

    @property
    def source(self) -> str:
        """Of the clips, as pretraining names it."""
        return self.config.data.manifest

    @property
    def real(self) -> bool:
        """On real clips."""
        return self.source.startswith(REAL)

    def missing(self) -> str | None:
        """What it can't run without and doesn't have."""
        if self.real and not Path(self.source.removeprefix(REAL)).is_file():
            return "--real FILE of real_clips.py"
        if self.config.target.checkpoint and not Path(self.config.target.checkpoint).is_file():
            return "--vae DIR of tools/train_vae.py"
        return None

    @property
    def steps(self) -> int:
        return (
            sum(stage.steps for stage in self.config.stages) if self.kind in ("pretrain", "supervised") else 0
        )

    @property
    def clips(self) -> int:
        """Seen in pretraining."""
        return self.steps * self.config.stages[0].batch

    def settings(self) -> dict[str, Any]:
        """All that the result depends on; files by name, wherever they lie."""
        config = {k: v for k, v in dataclasses.asdict(self._placeless()).items() if k not in OUTSIDE}
        source = REAL + Path(self.source.removeprefix(REAL)).name if self.real else self.source
        facts = {"config": config, "source": source, "probe": dataclasses.asdict(self.probe)}
        return json.loads(json.dumps(facts))

    def _placeless(self) -> RunConfig:
        """The configuration without the folders of its files."""
        target = self.config.target
        files = {name: getattr(target, name) for name in ("checkpoint", "statistics")}
        return part(self.config, "target", **{name: file and Path(file).name for name, file in files.items()})

    @property
    def key(self) -> str:
        config = set_fields(one_micro_batch(self._placeless()))
        facts = {"kind": self.kind, "config": config, "probe": set_fields(self.probe)}
        if self.source != MOVING_DIGITS:
            facts["source"] = REAL if self.real else self.source
        if self.until is not None:
            facts["until"] = self.until
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


OUTSIDE = (
    "recipe",
    "checkpoint",
    "eval",
    "wandb",
    "profile",
    "data",
    "parallel",
    "compile",
)  # no part in a result


def one_micro_batch(config: RunConfig) -> RunConfig:
    """The same run as it was said before stages had micro-batches of their own: old keys stay."""
    found = {config.micro_batch(stage) for stage in config.stages}
    if len(found) > 1:
        return config
    stages = tuple(dataclasses.replace(stage, micro_batch=None, max_micro_batch=1) for stage in config.stages)
    return config.altered(stages=stages, train={"micro_batch": None if found == {1} else found.pop()})


def set_fields(value: Any) -> Any:
    """The fields that aren't at their defaults: one that the code gets later leaves old keys alone."""
    if isinstance(value, tuple):
        return [set_fields(each) for each in value]
    if not dataclasses.is_dataclass(value):
        return value
    return {
        each.name: set_fields(getattr(value, each.name))
        for each in dataclasses.fields(value)
        if each.name not in OUTSIDE and getattr(value, each.name) != each.default
    }


def part(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    """`config` with fields of one of its parts changed."""
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)})


def generator_shape(text: str) -> TransformerShape:
    """WIDTHxDEPTH with heads of 32 and an MLP of four times the width."""
    width, x, depth = text.partition("x")
    require(
        bool(x) and width.isdecimal() and depth.isdecimal() and int(width) % 32 == 0,
        f"--other {text}: write WIDTHxDEPTH, e.g. 192x3, with a width that 32 divides",
    )
    return TransformerShape(int(width), int(depth), int(width) // 32, 4 * int(width))


def with_target(config: RunConfig, budget: Budget, kind: str) -> RunConfig:
    """Table 3: pixels, or latents of the small VAE."""
    require(kind in ("pixels", "vae"), f"--target {kind}: it is pixels or vae")
    if kind == "pixels":
        return part(config, "target", pixel_scale=budget.pixel_scale)
    files = {"checkpoint": "autoencoder.pt", "statistics": "latents_stats.pt"}
    files = {name: str(Path(budget.vae, file)) for name, file in files.items()}
    return part(config, "target", kind="va_vae", pixel_scale=1.0, **files)


def real(budget: Budget) -> RunConfig:
    """The full model on windows of real clips: 8 frames, of unit deviation as pixels are."""
    config = base(dataclasses.replace(budget, side=0, frames=REAL_FRAMES, target="pixels", pixel_scale=2.0))
    return part(config, "data", manifest=REAL + budget.real)


def base(budget: Budget, size: str = "m", share: float = 1.0) -> RunConfig:
    """The full model, over `share` of the budget's steps."""
    config = digits.make(
        size,
        max(10, round(budget.steps * share)),
        budget.batch,
        budget.peak,
        budget.image,
        budget.patch,
        budget.frames,
        budget.peak_flow,
    )
    other = generator_shape(budget.other)
    config = part(
        config,
        "model",
        init_std=budget.init_std,
        predictor=other,
        decoder=other,
        compile=bool(budget.compile),
    )
    config = part(config, "target", compile=bool(budget.compile))
    config = with_target(config, budget, budget.target)
    if budget.side:
        config = part(config, "data", manifest=f"{MOVING_DIGITS}:{budget.image}:{budget.side}")
    config = part(config, "optim", ema=budget.ema)
    config = part(config, "loss", flow=budget.flow, align=budget.align)
    return part(config, "train", precision=budget.precision, micro_batch=budget.batch)


def variants(budget: Budget) -> dict[str, tuple[str, RunConfig]]:
    """row -> kind and configuration, of seed 0."""
    full = base(budget)
    alone = recipes.ablate(full, "table2_gen_ciso")  # what Tables 4 and 5 build on
    out = {
        "full": ("pretrain", full),
        "random": ("random", full),
        "pixels": ("pixels", full),
        "supervised": ("supervised", full),
        "random_wide": ("random", part(full, "model", init_std=WIDE)),
    }
    for row in ("table2_gen", "table2_gen_ciso", "table2_align", "table2_align_ciso", "table12_no_ema"):
        out[row] = "pretrain", recipes.ablate(full, row)
    for row in ("table4_no_mask", "table5_cross", "table5_cross_self", "table11_tau4"):
        out[row] = "pretrain", recipes.ablate(full, row)
    twice = base(budget, share=2.0)  # Table 11 again after 30K steps
    out["table11_2x"] = "pretrain", twice
    out["table11_tau4_2x"] = "pretrain", recipes.ablate(twice, "table11_tau4")
    for target in ("pixels", "vae"):
        out[f"table3_{target}"] = "pretrain", with_target(full, budget, target)
    for kind in ("pretrain", "random", "supervised"):
        out["real_full" if kind == "pretrain" else f"real_{kind}"] = kind, real(budget)
    out["real_align"] = "pretrain", recipes.ablate(real(budget), "table2_align_ciso")
    out["align_raw"] = "pretrain", part(full, "model", align_target="none")
    for mode in ("packed", "truncate"):
        out[f"mask_{mode}"] = "pretrain", part(full, "mask", mode=mode)
    wide = generator_shape(f"{full.model.patch_dim}x2")  # one width for both: the decoder reads predictions
    wide = part(full, "model", predictor=wide, decoder=wide)
    out["decoder_wide"] = "pretrain", wide
    out["decoder_wide_gen"] = "pretrain", recipes.ablate(wide, "table2_gen_ciso")
    assert alone == out["table2_gen_ciso"][1]
    for size in digits.SIZES:
        for share in (0.25, 0.5, 1.0):
            if (size, share) != ("m", 1.0):  # that one is `full`
                out[f"scale_{size}_{share:g}"] = "pretrain", base(budget, size, share)
    return out


_SCALES = [f"scale_{size}_{share}" for share in ("1", "0.5", "0.25") for size in digits.SIZES]
_TABLE2 = ("gen", "gen_ciso", "align", "align_ciso")
ORDER: list[tuple[str, int]] = [  # short runs first: their places are free again soon
    *[(row, 0) for row in ("random", "pixels", "full", "supervised", "table2_gen_ciso")],
    *[(row, 0) for row in ("table2_align_ciso", "table12_no_ema", "table2_gen", "table2_align")],
    *[("full", 1), ("full", 2), ("table4_no_mask", 0), ("real_full", 0), ("random_wide", 0)],
    *[("table3_pixels", 0), ("table3_vae", 0)],
    *[(f"table2_{row}", 1) for row in _TABLE2],
    *[("table12_no_ema", 1), ("random", 1), ("random", 2), ("real_random", 0), ("real_supervised", 0)],
    *[(f"table2_{row}", 2) for row in _TABLE2],
    *[("table12_no_ema", 2)],
    *[(row, 0) for row in ("align_raw", "table5_cross", "table5_cross_self", "table11_tau4")],
    *[(row, 0) for row in ("mask_packed", "real_align", "mask_truncate")],
    *[(row, 0) for row in _SCALES if row != "scale_m_1"],
    *[(row, seed) for seed in (0, 1) for row in ("decoder_wide", "decoder_wide_gen")],
    *[("random_wide", 1), ("random_wide", 2), ("table11_2x", 0), ("table11_tau4_2x", 0)],
]


def probe_of(budget: Budget, kind: str, seed: int, real_: bool = False) -> ProbeConfig:
    """How a run is probed: on other clips than pretraining's."""
    return preset(
        "moving_digits",
        method="linear" if kind == "pixels" else "attentive",
        train_items=budget.probe_train,
        val_items=budget.probe_test,
        epochs=budget.probe_epochs,
        lrs=(3e-3, 1e-3),
        weight_decays=(0.01,),
        size=budget.image,
        frames=REAL_FRAMES if real_ else budget.frames,
        holdout=0.1,
        seed=100 + seed,
    )


def table(budget: Budget, rows: list[str] | None = None, seeds: list[int] | None = None) -> list[Run]:
    """The runs in order; `rows`: those rows alone (any of `variants`), with the seeds they have in it.

    `seeds`: those alone.
    """
    every = variants(budget)
    unknown = sorted(set(rows or ()) - every.keys())
    require(not unknown, f"no row {', '.join(unknown)}; there are {', '.join(every)}")
    order = ORDER if rows is None else [(row, seed) for row, seed in ORDER if row in rows]
    order += [(row, 0) for row in rows or () if (row, 0) not in order]
    same = f"table3_{budget.target}"  # is `full` under another name
    order = [(row, seed) for row, seed in order if row != same]
    out = []
    for row, seed in order:
        if seeds is not None and seed not in seeds:
            continue
        kind, config = every[row]
        probe = probe_of(budget, kind, seed, row.startswith("real_"))
        out.append(Run(row, seed, kind, part(config, "train", seed=seed), probe))
    return out
