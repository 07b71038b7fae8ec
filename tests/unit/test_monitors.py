"""Collapse monitors: exact however the step is cut, and still right when features have collapsed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nextvid_mcore.models import fused
from nextvid_mcore.training.monitors import Collapse, Constant, Moments


def named(collapse: Collapse) -> dict[str, float]:
    return dict(zip(collapse.names, collapse.result().tolist(), strict=True))


def test_equal_however_the_step_is_cut():
    generator = torch.Generator().manual_seed(1)
    z, reference, aligned = (torch.randn(12, 5, w, generator=generator) for w in (8, 16, 16))
    whole, cut = Collapse(), Collapse()
    whole.add(z, reference, aligned)
    for part in (slice(0, 3), slice(3, 4), slice(4, 12)):  # unequal micro-batches
        cut.add(z[part], reference[part], aligned[part])
    expected = {
        "z_var": z.reshape(-1, 8).var(0, unbiased=False).mean().item(),
        "reference_var": reference.reshape(-1, 16).var(0, unbiased=False).mean().item(),
        "align_cos": F.cosine_similarity(aligned, reference, dim=-1).mean().item(),
    }
    assert named(whole) == pytest.approx(expected, rel=1e-6)
    assert named(cut) == pytest.approx(expected, rel=1e-6)


def test_a_collapse_far_from_zero_is_seen():
    """Raw second moments in fp32 would answer 0, or below, here."""
    generator = torch.Generator().manual_seed(2)
    x = (1000 + 1e-2 * torch.randn(4096, 4, generator=generator)).double()
    seen = Moments.merged([Moments.of(x[:1000]), Moments.of(x[1000:])]).variance().item()
    assert seen == pytest.approx(x.float().double().var(0, unbiased=False).mean().item(), rel=1e-2)
    naive = (x.float().square().mean(0) - x.float().mean(0).square()).mean().item()
    assert abs(naive - seen) > seen


def test_permuted_features_are_not_copied(monkeypatch):
    seen = []
    given = fused.moments
    monkeypatch.setattr(fused, "moments", lambda x: seen.append(x.data_ptr()) or given(x))
    x = torch.randn(3, 4, 5, 6)
    found = [Moments.of(y).packed for y in (x, x.permute(2, 0, 1, 3), x[:, 1:])]
    assert seen[0] == seen[1] == x.data_ptr() != seen[2]
    assert torch.equal(found[0], found[1]) and found[2][0] == 45


def test_each_step_starts_empty():
    collapse = Collapse()
    collapse.add(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2))
    assert named(collapse) == {"z_var": 0.0, "reference_var": 0.0, "align_cos": pytest.approx(1.0)}
    collapse.add(torch.eye(2), torch.eye(2), -torch.eye(2))
    assert named(collapse)["align_cos"] == pytest.approx(-1.0)


def test_a_constant_is_noticed_once_and_its_end() -> None:
    constant, said = Constant(), {}
    variances = [0.2] + [5e-6] * 90 + [0.01] + [5e-6] * 50 + [float("nan")] + [5e-6] * 150 + [5e-4] * 20
    for step, variance in enumerate([*variances, 0.02, 0.1, *[5e-6] * 100], start=1):
        if (note := constant.note(step, variance)) is not None:
            said[step] = note
    begins = 1 + 90 + 1 + 50 + 1 + 100  # neither 90 steps are enough, nor 50 and the one that was skipped
    ends = len(variances) + 1
    assert list(said) == [begins, ends, ends + 1 + 100]
    assert said[begins].startswith(
        f"step {begins}: for 100 steps the predictions have been one vector at all"
    )
    assert said[ends] == f"step {ends}: predictions differ from token to token again (z_var 2.0e-02)"
