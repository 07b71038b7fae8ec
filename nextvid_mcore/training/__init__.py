"""Optimizers, the EMA, checkpoints and the loop of a run."""
