"""From a layout to what the networks' constructors want to know of it."""

from __future__ import annotations

import torch

from nextvid_mcore.config import RunConfig
from nextvid_mcore.models.specs import Split
from nextvid_mcore.parallel.groups import Layout
from nextvid_mcore.parallel.stages import last_stage_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_split(config: RunConfig, layout: Layout) -> Split:
    """The sizes of `layout` with the run's recomputation and precision."""
    return Split(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        recompute=config.parallel.recompute,
        last_stage_layers=last_stage_layers(config, layout.pipeline),
        dtype=DTYPES[config.train.precision],
    )
