"""README.md of an export: what was trained, on what, and how to use it, all taken from the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nextvid_mcore.config import RunConfig

CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- video
- self-supervised
- nextvid
---

# NExT-Vid encoder, recipe `{recipe}`

A video ViT pretrained by autoregressive next-frame prediction (NExT-Vid) with nextvid_mcore {version}:
{millions:.1f}M parameters, the {weights} weights after step {step} of {total}. It turns a clip into a
feature vector for every {tubelet} frames of {patch} x {patch} pixels; a frame's features never depend on
later frames.

## Use

```python
import torch
from transformers import AutoImageProcessor, AutoModel

DIR = "."  # this folder, or its name on the hub
model = AutoModel.from_pretrained(DIR, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(DIR, trust_remote_code=True)

inputs = processor(videos=video)          # uint8 [T, H, W, 3], T a multiple of {tubelet}; or images=picture
with torch.no_grad():
    tokens = model(**inputs).last_hidden_state   # [1, T / {tubelet} * {grid} * {grid}, {width}]
    maps = model.get_intermediate_layers(inputs["pixel_values_videos"].transpose(1, 2), n=4, reshape=True)
```

`AutoVideoProcessor` (which wants torchvision) loads the same processor; there a clip is what it takes first.
`vit.py` needs torch alone and works without transformers. The encoder has no classifier: probe it
(an attentive probe, kNN, a linear layer) or fine-tune it.

## Model

{model}

## Training

{training}
{losses}
## Limits

The features are those of the data above and carry its biases. Nothing here was tuned for a task. Sizes
other than the pretraining's work (positions are extrapolated) and were not measured.
"""


def table(rows: Sequence[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def write(
    run: RunConfig,
    config: Mapping[str, Any],
    parameters: int,
    metrics: Mapping[str, Any] | None,
    held_out: Mapping[str, Any] | None,
) -> str:
    """The card's text. config: the hub's flat config; metrics, held_out: the last rows of the run's files."""
    weights = "EMA" if config["weights"] == "ema" else "online"
    model = table(
        [
            (
                "width, layers, heads, MLP",
                ", ".join(str(config[k]) for k in ("width", "depth", "heads", "mlp_width")),
            ),
            ("pixels, frames", f"{config['image_size']} x {config['image_size']}, {config['frames']}"),
            (
                "token",
                f"{config['tubelet_size']} frames of {config['patch_size']} x {config['patch_size']} pixels",
            ),
            ("attention", "frame-wise causal, 3D RoPE"),
        ]
    )
    sets = ", ".join(f"{each.name} {each.weight:g}" for each in run.data.sets)
    stages = "; ".join(
        f"{s.name}: {s.steps:,} steps of {run.batch(s)} clips of {s.frames} frames, "
        f"lr {s.lr_start:g} to {s.lr_end:g}"
        for s in run.stages
    )
    losses = " and ".join(
        name
        for name, there in (("flow matching", run.model.generate), ("alignment", run.model.align))
        if there
    )
    training = table(
        [
            ("objective", f"next-frame prediction: {losses}"),
            ("target", run.target.kind if run.model.generate else "none"),
            ("data sets, weights", sets or "all sets of the run's manifest, by their size"),
            ("frames a second", f"{run.data.fps:g}"),
            ("masks", f"{run.mask.mode}, {run.mask.masks} a clip"),
            ("stages", stages),
            (
                "optimizer",
                f"AdamW ({run.optim.beta1}, {run.optim.beta2}), weight decay {run.optim.weight_decay}",
            ),
            ("EMA decay", f"{run.optim.ema:g}"),
            ("precision, seed", f"{run.train.precision}, {run.train.seed}"),
            ("clips seen", f"{metrics['samples']:,}" if metrics and "samples" in metrics else "not recorded"),
        ]
    )
    lines = []
    for what, row in (("training clips, last step", metrics), (f"held-out clips, {weights}", held_out)):
        values = row or {}
        parts = [f"{key} {values[key]:.4f}" for key in ("loss", "loss_flow", "loss_align") if values.get(key)]
        if parts:
            lines.append((what, ", ".join(parts)))
    return CARD.format(
        recipe=config["recipe"],
        version=config["version"],
        millions=parameters / 1e6,
        weights=weights,
        step=f"{config['step']:,}",
        total=f"{sum(stage.steps for stage in run.stages):,}",
        tubelet=config["tubelet_size"],
        patch=config["patch_size"],
        grid=config["image_size"] // config["patch_size"],
        width=config["width"],
        model=model,
        training=training,
        losses=f"\nLosses at the end:\n\n{table(lines)}\n" if lines else "",
    )
