"""The update's kernels against torch's AdamW, clipping and lerp; on a GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch

from nextvid_mcore.models import triton_update
from nextvid_mcore.models.triton_update import AdamW, Shard, Table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (1, 5, 511, 512, 513, triton_update.CHUNK, triton_update.CHUNK + 3, 2 * triton_update.CHUNK + 700)
ADAM = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0, ema=0.9)
LR = 1e-2


def made(sizes: tuple[int, ...] = SIZES, offset: int = 0) -> list[Shard]:
    """Matrices and vectors, some without EMA, one that the norm leaves out; `offset` elements into memory."""
    torch.manual_seed(0)

    def draw(size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(offset + size) * scale).to(DEVICE, dtype)[offset:]

    return [
        Shard(
            draw(size),
            draw(size, scale=0.0),
            draw(size, scale=0.0),
            draw(size),
            draw(size, torch.bfloat16),
            ema=None if i % 4 == 1 else draw(size),
            reference=draw(size, torch.bfloat16) if i % 4 > 1 else None,
            decay=0.3 * (i % 2),
            counted=i != 2,
        )
        for i, size in enumerate(sizes)
    ]


def length(shards: list[Shard]) -> torch.Tensor:
    return torch.cat([x.grad.double() for x in shards if x.counted]).norm()


@pytest.mark.parametrize(("aligned", "scale"), [(True, 1.0), (False, 1e-3)], ids=["clipped", "odd-addresses"])
def test_steps_are_adamw_and_lerp(aligned: bool, scale: float) -> None:
    shards = made(offset=0 if aligned else 1)
    masters = [x.master.clone().requires_grad_() for x in shards]
    emas = [None if x.ema is None else x.ema.clone() for x in shards]
    groups = [{"params": [p], "weight_decay": x.decay} for p, x in zip(masters, shards, strict=True)]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps)
    table = Table(shards, DEVICE)
    assert table.aligned == aligned
    for number in range(1, 4):
        for shard in shards:
            shard.grad.normal_(std=scale * number)
        norm = table.squares().sqrt()
        torch.testing.assert_close(norm, length(shards), rtol=1e-6, atol=0.0)
        factor = min(1.0, ADAM.clip / (norm.item() + 1e-6))
        assert (factor < 1) == (scale == 1)
        for master, shard in zip(masters, shards, strict=True):
            master.grad = shard.grad * factor
        adam.step()
        table.update(norm.float().reshape(1), LR, ADAM, number)
        for master, ema, shard in zip(masters, emas, shards, strict=True):
            torch.testing.assert_close(shard.master, master.detach(), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(shard.moment, adam.state[master]["exp_avg"], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(shard.square, adam.state[master]["exp_avg_sq"], rtol=1e-5, atol=1e-12)
            assert torch.equal(shard.weight, shard.master.bfloat16())
            if ema is not None:
                ema.lerp_(shard.master, 1 - ADAM.ema)
                torch.testing.assert_close(shard.ema, ema, rtol=1e-6, atol=1e-7)
            if shard.reference is not None:
                assert torch.equal(shard.reference, shard.ema.bfloat16())


def test_nothing_outside_a_shard_is_written() -> None:
    shards = made()
    memory = [torch.full((x.grad.numel() + 8,), 7.0, dtype=x.weight.dtype, device=DEVICE) for x in shards]
    for shard, wide in zip(shards, memory, strict=True):
        object.__setattr__(shard, "weight", wide[4:-4])
    Table(shards, DEVICE).update(torch.ones(1, device=DEVICE), LR, ADAM, 1)
    for shard, wide in zip(shards, memory, strict=True):
        assert torch.equal(wide[4:-4], shard.master.bfloat16())
        assert (wide[:4] == 7).all() and (wide[-4:] == 7).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    shards = made()
    table = Table(shards, DEVICE)
    table.update(table.squares().sqrt().float().reshape(1), LR, ADAM, 1)
    shards[-1].grad[-1] = bad
    before = [[x.clone() for x in shard.tensors() if x is not None] for shard in shards]
    norm = table.squares().sqrt().float().reshape(1)
    assert not math.isfinite(norm.item())
    table.update(norm, LR, ADAM, 2)
    for shard, kept in zip(shards, before, strict=True):
        now = [x for x in shard.tensors() if x is not None]
        assert all(torch.equal(a, b) for a, b in zip(now[1:], kept[1:], strict=True))  # [0]: the gradient


def test_what_the_norm_leaves_out_is_not_looked_at() -> None:
    shards = made()
    shards[2].grad.fill_(math.nan)
    assert math.isfinite(Table(shards, DEVICE).squares().item())


def test_the_ends_of_the_average_are_exact() -> None:
    for keep in (0.0, 1.0):
        shards = made((700,))
        begin = shards[0].ema.clone()
        Table(shards, DEVICE).update(torch.ones(1, device=DEVICE), LR, AdamW(0.9, 0.95, 1e-8, 1.0, keep), 1)
        assert torch.equal(shards[0].ema, begin if keep else shards[0].master)


def test_chunks_cover_every_element_once() -> None:
    shards = made()
    table = Table(shards, DEVICE)
    seen = [torch.zeros(x.grad.numel(), dtype=torch.int) for x in shards]
    for number, first in table.chunks.tolist():
        seen[number][first : first + triton_update.CHUNK] += 1
    assert all((x == 1).all() for x in seen)
    assert table.rows[:, triton_update.SIZE.value].tolist() == [*SIZES]


def test_no_shards_are_no_work() -> None:
    table = Table([], DEVICE)
    assert table.squares().item() == 0
    table.update(torch.ones(1, device=DEVICE), LR, ADAM, 1)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    x, y = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="square must be contiguous torch.float32"):
        Shard(x, x, torch.zeros(5), x, y)
    with pytest.raises(ValueError, match="weight must be contiguous torch.bfloat16"):
        Shard(x, x, x, x, x)
    with pytest.raises(ValueError, match="there is no EMA"):
        Shard(x, x, x, x, y, reference=y)
