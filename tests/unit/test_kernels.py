"""Attention patterns, which kernel a pattern gets, and ours in Triton's interpreter."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_mask

from nextvid_mcore.models import fused, kernels, padded
from nextvid_mcore.models.attention import Frames, ragged_pattern, regular_pattern

CPU = torch.device("cpu")
VISIBLE = (Frames(0, 3, 6), Frames(0, 3, 4))
ASKED = (Frames(1, 3, 5),) * 2


def dense(pattern, queries: int, keys: int) -> torch.Tensor:
    """The whole sequence's mask from its stretches, bool [queries, keys]."""
    out = torch.zeros(queries, keys, dtype=torch.bool)
    for x in pattern.stretches:
        out[x.q_start : x.q_stop, x.k_start : x.k_stop] = x.allowed[0, 0]
    return out


def test_flex_sees_what_the_stretches_allow() -> None:
    for queries, keys, rule in (
        (VISIBLE, VISIBLE, "causal"),
        (ASKED, VISIBLE, "autoregressive"),
        (VISIBLE, VISIBLE, "isolated"),
    ):
        pattern = regular_pattern(queries, keys, rule, CPU)
        sizes = [sum(x.number * x.tokens for x in part) for part in (queries, keys)]
        blocks = kernels.flex_blocks(pattern.stretches, block=16)
        wanted = dense(pattern, *sizes)
        assert torch.equal(create_mask(blocks.mask_mod, None, None, *sizes, device="cpu")[0, 0], wanted)
        assert 0 < wanted.sum() < wanted.numel()
        for i, j in ((i, j) for i in range(0, sizes[0], 16) for j in range(0, sizes[1], 16)):
            computed = blocks.to_dense()[0, 0, i // 16, j // 16]
            assert bool(computed) >= bool(wanted[i : i + 16, j : j + 16].any())  # nothing seen is skipped


def test_first_frames_and_orders_of_a_pattern() -> None:
    pattern = regular_pattern(ASKED, VISIBLE, "autoregressive", CPU)
    first, second = pattern.stretches
    assert (first.q_stop, first.k_stop, second.q_start, second.k_start) == (15, 18, 15, 18)
    assert first.allowed[0, 0, 0].tolist() == [True] * 6 + [False] * 12  # frame 1 sees frame 0 alone
    assert regular_pattern(ASKED, VISIBLE, "autoregressive", CPU) is pattern  # kept


def test_padded_stretches_equal_the_reference() -> None:
    counts = (3, 1, 7)  # tokens a frame of three stretches, four frames of context and of queries
    keys = torch.cat([torch.arange(4).repeat_interleave(x) for x in counts])[None]
    asked = torch.arange(1, 5).repeat_interleave(5).repeat(3)[None]
    lengths = [4 * x for x in counts]
    for frames, sizes, rule in ((keys, lengths, "causal"), (asked, [20] * 3, "autoregressive")):
        pattern = ragged_pattern(frames, sizes, keys, lengths, rule)
        assert pattern.padded.allowed.shape == (3, 1, 32, 32)
        made = [torch.randn(1, 2, n, 8, dtype=torch.double) for n in (sum(sizes), *[sum(lengths)] * 2)]
        assert kernels.choose(made[0], pattern) is padded.attend
        both = [[x.clone().requires_grad_() for x in made] for _ in range(2)]
        wanted, found = kernels.masked(*both[0], pattern), padded.attend(*both[1], pattern)
        torch.testing.assert_close(found, wanted)
        grad = torch.randn_like(wanted)
        wanted.backward(grad)
        found.backward(grad)
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(b.grad, a.grad)


def test_choice(monkeypatch) -> None:
    pattern = regular_pattern(VISIBLE, VISIBLE, "causal", CPU)
    flexible = regular_pattern.__wrapped__(VISIBLE, VISIBLE, "causal", CPU)
    object.__setattr__(flexible, "blocks", kernels.flex_blocks(flexible.stretches))
    half = torch.zeros(1, 2, 128, 16, dtype=torch.bfloat16)
    assert kernels.choose(half, None) is kernels.plain
    assert kernels.choose(half, flexible) is kernels.masked  # on a CPU
    monkeypatch.setattr(fused, "compiles", lambda x: True)
    assert kernels.choose(half, flexible) is kernels.flex
    assert kernels.choose(half, pattern) is kernels.masked  # no blocks
    assert kernels.choose(half.float(), flexible) is kernels.masked
    assert kernels.choose(half[..., :8], flexible) is kernels.masked
    assert kernels.choose(half[:, :, :100], flexible) is kernels.masked


def test_hopper_has_its_own_choices(monkeypatch) -> None:
    from nextvid_mcore.models import inductor

    monkeypatch.setattr(kernels, "_gluon", lambda: False)
    monkeypatch.setattr(kernels, "_hopper", lambda device: True)
    monkeypatch.setattr(fused, "compiles", lambda x: True)
    kernels.tiles.cache_clear()
    half = torch.randn(2, 3, 128, 32, dtype=torch.bfloat16)
    assert kernels.choose(half, None) is kernels.plain
    assert kernels.flex_blocks(regular_pattern(VISIBLE, VISIBLE, "causal", CPU).stretches).BLOCK_SIZE == (
        64,
        64,
    )
    (tile,) = inductor.Choices().get_flex_attention_bwd_configs(64, torch.bfloat16)
    assert (tile.block_m1, tile.block_n1, tile.block_m2, tile.block_n2) == (32, 64, 64, 32)
    kernels.tiles.cache_clear()


def test_whole_frames_without_a_gradient_see_prefixes(monkeypatch) -> None:
    whole, other = (Frames(0, 3, 64),), (Frames(0, 3, 96),)
    pattern = regular_pattern(whole, whole, "causal", CPU)
    assert pattern.prefix == 64
    assert regular_pattern(VISIBLE, VISIBLE, "causal", CPU).prefix is None  # two stretches
    assert regular_pattern((Frames(1, 2, 64),), whole, "autoregressive", CPU).prefix is None
    half = torch.zeros(1, 2, 192, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(kernels, "_hopper", lambda device: True)
    with torch.no_grad():
        assert kernels.choose(half, pattern) is kernels.masked  # on a CPU
    monkeypatch.setattr(fused, "compiles", lambda x: True)
    assert kernels.choose(half, pattern) is kernels.masked  # a gradient may be wanted
    with torch.no_grad():
        assert kernels.choose(half, pattern) is kernels.prefix
        assert kernels.choose(half.float(), pattern) is kernels.masked
        assert kernels.choose(half[..., :24], pattern) is kernels.masked
        assert (
            kernels.choose(half, regular_pattern(other, other, "causal", CPU)) is kernels.masked
        )  # 96 tokens
        monkeypatch.setattr(kernels, "_hopper", lambda device: False)
        assert kernels.choose(half, pattern) is kernels.masked


def test_patterns_with_stairs(monkeypatch) -> None:
    student = regular_pattern(VISIBLE, VISIBLE, "causal", CPU)
    assert student.stairs == ((0, 0, 3, 6, 6), (18, 18, 3, 4, 4))
    assert regular_pattern(ASKED, VISIBLE, "autoregressive", CPU).stairs == (
        (0, 0, 3, 5, 6),
        (15, 18, 3, 5, 4),
    )
    for queries, rule in ((VISIBLE, "isolated"), (VISIBLE, "autoregressive"), (ASKED, "causal")):
        assert regular_pattern(queries, VISIBLE, rule, CPU).stairs is None
    fewer = (Frames(1, 2, 5),) * 2
    assert regular_pattern(fewer, VISIBLE, "autoregressive", CPU).stairs is None
    monkeypatch.setattr(kernels, "_gluon", lambda: False)
    monkeypatch.setattr(kernels, "_hopper", lambda device: True)
    monkeypatch.setattr(fused, "compiles", lambda x: True)
    half = torch.zeros(1, 2, 128, 32, dtype=torch.bfloat16)
    assert kernels.choose(half, student) is kernels.masked  # frames of 6 and 4 tokens
    even = (Frames(0, 3, 32), Frames(0, 2, 16))
    student = regular_pattern(even, even, "causal", CPU)
    for shortest, kernel in ((129, kernels.masked), (128, kernels.stairs)):
        monkeypatch.setattr(kernels, "STAIRS_SHORTEST", shortest)
        assert kernels.choose(half, student) is kernel
    monkeypatch.setattr(kernels, "STAIRS_SHORTEST", 129)
    monkeypatch.setattr(kernels, "_gluon", lambda: True)
    assert kernels.choose(half, student) is kernels.stairs
    assert kernels.choose(half[:, :, :100], student) is kernels.masked
    assert kernels.choose(half, None) is kernels.whole
    assert kernels.choose(half[:, :, :100], None) is kernels.choose(half.float(), None) is kernels.plain
    assert kernels.choose(half[..., :8], None) is kernels.plain
    assert kernels.choose(half.float(), student) is kernels.masked
    assert kernels.choose(half[..., :24], student) is kernels.masked


@pytest.fixture
def scalars(monkeypatch) -> None:
    """Triton 3.6's interpreter takes arrays of one number for indices, which numpy 2.5 does no more."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has it compiled")
@pytest.mark.parametrize(("frame", "width"), [(64, 32), (128, 64)])
def test_prefix_attention_is_the_masked_one(scalars: None, frame: int, width: int) -> None:
    rows, heads, frames = 2, 3, 3
    whole = (Frames(0, frames, frame),)
    pattern = regular_pattern(whole, whole, "causal", CPU)
    packed = torch.randn(frames * frame, rows, heads, 3, width, dtype=torch.half)
    views = [x.permute(1, 2, 0, 3) for x in packed.unbind(3)]
    wanted = kernels.masked(*(x.float() for x in views), pattern)
    own = [x.contiguous() for x in views[:2]]  # of other strides than the values
    for q, k, v in (views, (*own, views[2])):
        found = kernels.prefix(q, k, v, pattern)
        assert found.permute(2, 0, 1, 3).is_contiguous()
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has it compiled")
@pytest.mark.parametrize(
    ("queries", "keys", "rule"),
    [
        ((Frames(0, 3, 48), Frames(0, 2, 20)),) * 2 + ("causal",),
        ((Frames(1, 3, 70),) * 2, (Frames(0, 3, 40), Frames(0, 3, 24)), "autoregressive"),
        ((Frames(0, 5, 7), Frames(0, 2, 140), Frames(0, 1, 3)),) * 2 + ("causal",),
    ],
)
def test_attention_up_stairs_is_the_masked_one(scalars: None, queries, keys, rule: str) -> None:
    """Output and gradients, from views of packed heads as the networks have them."""
    rows, heads, width = 2, 2, 16
    pattern = regular_pattern(queries, keys, rule, CPU)
    asked, visible = (sum(x.number * x.tokens for x in part) for part in (queries, keys))
    packed = torch.randn(visible, rows, heads, 3, width)
    own = packed[..., 0, :] if rule == "causal" else torch.randn(asked, rows, heads, width)
    made = [x.permute(1, 2, 0, 3) for x in (own, packed[..., 1, :], packed[..., 2, :])]
    exact, single = (
        [x.to(kind).detach().requires_grad_() for x in made] for kind in (torch.double, torch.float)
    )
    wanted, found = kernels.masked(*exact, pattern), kernels.stairs(*single, pattern)
    assert found.permute(2, 0, 1, 3).is_contiguous()
    grad = torch.randn_like(found)
    wanted.backward(grad.double())
    found.backward(grad)
    for a, b in ((wanted, found), *((x.grad, y.grad) for x, y in zip(exact, single, strict=True))):
        assert (a - b).norm() < 1e-6 * a.norm()


def test_torch_never_takes_cudnn_for_what_is_trained(monkeypatch) -> None:
    """Every call of torch's attention goes through models/sdpa.py, which rules cuDNN out on CUDA devices."""
    from nextvid_mcore.models import sdpa

    asked = []
    monkeypatch.setattr(
        sdpa, "sdpa_kernel", lambda kernels: asked.append(kernels) or contextlib.nullcontext()
    )
    with sdpa.allowed(torch.device("cuda")):
        assert asked == [[SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]]
    models = Path(sdpa.__file__).parent
    callers = [x.name for x in models.glob("*.py") if "scaled_dot_product_attention(" in x.read_text()]
    assert callers == ["sdpa.py"]
