"""Optimizer, EMA and checkpoints on one GPU, with Transformer Engine's FusedAdam where it is installed."""

import torch
from launch import shared
from small import assemble
from test_checkpoint import load_and_go_on, save_steps
from test_optimizer import (  # noqa: F401  collected here again, on the GPU
    test_ema_is_fp32_and_the_reference_is_its_rounding,
    test_one_step_is_adamw_with_table_8,
)

from nextvid_mcore.parallel.groups import Layout


def kind_of_adam() -> tuple[str, bool]:
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
    from small import build

    _, optimizers = build(Layout())
    return type(optimizers.optimizers["student"].optimizer).__name__, HAVE_APEX_OR_TE


def test_fused_adam_where_there_is_one():
    name, fused = shared(1).run(kind_of_adam)[0]
    assert name == ("FusedAdam" if fused else "AdamW")


def test_save_load_and_go_on(tmp_path):
    path, state = shared(1).run(save_steps, str(tmp_path), Layout(), 2)[0]
    _, later = shared(1).run(save_steps, str(tmp_path / "later"), Layout(), 3)[0]
    progress, loaded, after, _, updates = shared(1).run(load_and_go_on, path, Layout())[0]
    state, loaded, later, after = (assemble([s]) for s in (state, loaded, later, after))
    assert (progress.step, updates) == (2, 3)
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert all(torch.equal(after[k], later[k]) for k in later)
