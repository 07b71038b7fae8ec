"""How many encoder layers each pipeline stage holds.

Colocated predictor, decoder and targets sit on the last stage, so it gets fewer encoder layers: as many as
make its work nearest to the others'. megatron-core wants the other stages equal.
"""

from __future__ import annotations

from nextvid_mcore import flops
from nextvid_mcore.config import ConfigError, RunConfig, StageConfig


def last_stage_layers(config: RunConfig, pipeline: int) -> int | None:
    """Encoder layers on the last of `pipeline` stages; None for a single stage.

    Raises:
        ConfigError: no split leaves equal stages before the last; the message lists the depths' choices.
    """
    if pipeline == 1:
        return None
    depth = config.model.encoder.depth
    heaviest = max(config.stages, key=lambda stage: stage.steps * config.batch(stage))
    colocated = config.parallel.placement == "colocated"
    extra = generator_layers(config, heaviest) if colocated else 0.0
    choices = [last for last in range(1, depth) if (depth - last) % (pipeline - 1) == 0]
    if not choices:
        raise ConfigError(
            f"{depth} encoder layers can't fill {pipeline} pipeline stages; use at most {depth} stages"
        )
    return min(choices, key=lambda last: max(last + extra, (depth - last) / (pipeline - 1)))


def stage_layers(config: RunConfig, pipeline: int) -> list[int]:
    """Encoder layers of each of `pipeline` stages."""
    depth, last = config.model.encoder.depth, last_stage_layers(config, pipeline)
    return [depth] if last is None else [(depth - last) // (pipeline - 1)] * (pipeline - 1) + [last]


def generator_layers(config: RunConfig, stage: StageConfig) -> float:
    """Work of predictor, decoder and target in units of one encoder layer (student and reference)."""
    work = flops.clip_flops(config, stage, executed=True)
    target = flops.target_flops(config, stage)
    layer = (work.student + work.reference) / config.model.encoder.depth
    return (work.predictor + work.decoder + target) / layer
