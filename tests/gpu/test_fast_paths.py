"""The fast paths against the slow ones, one GPU: compiled pieces with FlexAttention, and CUDA graphs.

Compiled and eager round at other places (bf16: a gradient's error is some rounding steps of 2^-8), so
directions and norms are compared: cosine above 0.99 per tensor, losses and norms within 2%. A recorded pass
runs the same kernels as an eager one: losses and gradients within 1e-3, since sums by atomics keep no order.
"""

from __future__ import annotations

import dataclasses

import parity
import pytest
import torch
import torch.nn.functional as F
from launch import run

from nextvid_mcore.config import RunConfig, TransformerShape
from nextvid_mcore.training import graphs
from nextvid_mcore.training import step as training_step

SHAPE = TransformerShape(width=128, depth=4, heads=4, mlp=256)  # heads of 32
WAYS = {  # backend, compiled, recorded, recomputed, image size: the decoder's rows have 64 tokens, or 256
    "local": ("local", False, "off"),
    "local compiled": ("local", True, "off"),
    "te": ("te", False, "off"),
    "te compiled": ("te", True, "off"),
    "te recorded": ("te", False, "on"),
    "te compiled recorded": ("te", True, "on"),
    "te compiled recorded pieces": ("te", True, "on", "pieces"),
    "te compiled, long rows": ("te", True, "off", "none", 128),
    "te compiled recorded, long rows": ("te", True, "on", "none", 128),
}


def small(backend: str, compile: bool, recorded: str, recompute: str = "none", image: int = 64) -> RunConfig:
    return parity.small((SHAPE, SHAPE), recompute=recompute).altered(
        model={"backend": backend, "compile": compile, "image_size": image},
        train={"precision": "bf16", "cuda_graphs": recorded},
    )


def steps(*way: object) -> dict:
    """Losses and norms of five steps, and two later gradients of the same weights and clips."""
    config = small(*way)
    step = parity.built(config)
    assert (step.engine.graphs is not None) == (way[2] == "on")
    point = parity.schedule(config).at(0)
    clips = parity.clips(config, point, 0, 1)
    losses, norms, grads, said = [], [], [], []
    if step.engine.graphs is not None:
        step.engine.graphs.say = said.append
    for _ in range(5):
        result = step.run(point, clips)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    for _ in range(2):  # with graphs these passes are replays
        step.gradients(point, clips)
        grads.append(parity.gradients(step))
    return {"losses": losses, "norms": norms, "grads": grads, "said": said}


def all_ways() -> dict:
    return {name: steps(*way) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def found() -> dict:
    return run(all_ways, 1, timeout=400)[0]


@pytest.mark.parametrize("backend", ["local", "te"])
def test_compiled_equals_eager(found: dict, backend: str) -> None:
    eager, compiled = found[backend], found[f"{backend} compiled"]
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=2e-2)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=2e-2)
    for name, grad in eager["grads"][0].items():
        assert grad.abs().max() > 0, name
        cosine = F.cosine_similarity(grad.flatten(), compiled["grads"][0][name].flatten(), dim=0)
        assert cosine > 0.99, f"{name}: {cosine}"


@pytest.mark.parametrize(
    ("way", "other"),
    [
        ("te", "te recorded"),
        ("te compiled", "te compiled recorded"),
        ("te compiled, long rows", "te compiled recorded, long rows"),
        ("te compiled recorded", "te compiled recorded pieces"),
    ],
)
def test_recorded_equals_eager(found: dict, way: str, other: str) -> None:
    """And what makes norms and GELUs again equals what keeps them."""
    eager, recorded = found[way], found[other]
    print(f"\n{other}: {recorded['said']}")
    assert len(recorded["said"]) == 1  # it was compared when it was recorded, too
    assert recorded["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert recorded["norms"] == pytest.approx(eager["norms"], rel=1e-3)
    for name, grad in eager["grads"][0].items():
        for grads in recorded["grads"]:  # a second replay must not remember the first
            assert (grad - grads[name]).norm() <= 2e-2 * grad.norm(), name


def broken(way: str | None) -> dict:
    """Losses and gradients of two passes; with a `way`, one of them is to be recorded and breaks off.

    error: by an exception in the backward pass. wait: by a wait for the device, which CUDA doesn't record.
    garble: it doesn't, but works on the gradient of other tokens, as a wrong kernel would.
    """
    step = parity.built(small("te", False, "auto" if way else "off"))
    warnings: list[str] = []
    training_step.log.warning = lambda text, *args: warnings.append(text % args)

    def break_off(module: torch.nn.Module, grads: tuple[torch.Tensor, ...]) -> tuple | None:
        if not torch.cuda.is_current_stream_capturing():
            return None
        if way == "garble":
            return tuple(None if grad is None else grad.flip(0) for grad in grads)
        if way == "error":
            raise RuntimeError("broken off")
        grads[0].sum().item()
        return None

    step.model.student.encoder.block.layers[2].register_full_backward_pre_hook(break_off)
    point = parity.schedule(step.config).at(0)
    clips = parity.clips(step.config, point, 0, 1)
    assert (step.engine.graphs is not None) == (way is not None) and len(clips) > graphs.WARM
    found = [(step.gradients(point, clips)[0], parity.gradients(step)) for _ in range(2)]
    assert step.engine.graphs is None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {"passes": found, "warnings": warnings, "reserved": torch.cuda.memory_reserved()}


@pytest.fixture(scope="module")
def unbroken() -> dict:
    return run(broken, 1, None)[0]


@pytest.mark.parametrize("way", ["error", "wait", "garble"])
def test_a_step_whose_recording_breaks_off_is_done_again_eagerly(unbroken: dict, way: str) -> None:
    eager, again = unbroken, run(broken, 1, way)[0]
    print(f"{way}: {again['warnings']}, {again['reserved']} bytes reserved; eager {eager['reserved']}")
    assert len(again["warnings"]) == 1 and not eager["warnings"]
    assert ("not those of an eager pass" in again["warnings"][0]) == (way == "garble")
    for (losses, grads), (wanted, exact) in zip(again["passes"], eager["passes"], strict=True):
        assert losses == pytest.approx(wanted, rel=1e-3)
        for name, grad in exact.items():
            assert (grad - grads[name]).norm() <= 2e-2 * grad.norm(), name
    assert again["reserved"] <= eager["reserved"] + 2**24


def test_flex_attention_equals_the_masked_reference() -> None:
    from nextvid_mcore.models import kernels
    from nextvid_mcore.models.attention import Frames, regular_pattern

    device = torch.device("cuda")
    visible, asked = (Frames(0, 7, 96), Frames(0, 7, 48)), (Frames(1, 7, 256),) * 2
    for queries, keys, rule in ((visible, visible, "causal"), (asked, visible, "autoregressive")):
        pattern = regular_pattern(queries, keys, rule, device)
        sizes = [sum(x.number * x.tokens for x in part) for part in (queries, keys, keys)]
        for width in (64, 32):
            made = [torch.randn(2, 3, s, width, device=device) for s in sizes]
            exact = [x.clone().requires_grad_() for x in made]
            half = [x.bfloat16().requires_grad_() for x in made]
            wanted, found = kernels.masked(*exact, pattern), kernels.flex(*half, pattern)
            assert kernels.choose(half[0], dataclasses.replace(pattern, stairs=None)) is kernels.flex
            grad = torch.randn_like(wanted)
            wanted.backward(grad)
            found.backward(grad.bfloat16())
            for a, b in ((wanted, found), *((x.grad, y.grad) for x, y in zip(exact, half, strict=True))):
                assert (a - b.float()).norm() <= 1e-2 * a.norm()


def test_padded_attention_equals_the_masked_reference() -> None:
    from nextvid_mcore.models import kernels, padded
    from nextvid_mcore.models.attention import ragged_pattern

    device, counts = torch.device("cuda"), (6, 1, 3, 11)  # tokens a frame of the stretches
    lengths, frames = [7 * x for x in counts], torch.arange(7)
    keys = torch.cat([frames.repeat_interleave(x) for x in counts])[None].to(device)
    asked = (frames + 1).repeat_interleave(16).repeat(len(counts))[None].to(device)
    for queries, sizes, rule in ((keys, lengths, "causal"), (asked, [112] * 4, "autoregressive")):
        pattern = ragged_pattern(queries, sizes, keys, lengths, rule)
        made = [torch.randn(1, 3, n, 32, device=device) for n in (sum(sizes), *[sum(lengths)] * 2)]
        exact = [x.clone().requires_grad_() for x in made]
        half = [x.bfloat16().requires_grad_() for x in made]
        wanted, found = kernels.masked(*exact, pattern), padded.attend(*half, pattern)
        grad = torch.randn_like(wanted)
        wanted.backward(grad)
        found.backward(grad.bfloat16())
        for a, b in ((wanted, found), *((x.grad, y.grad) for x, y in zip(exact, half, strict=True))):
            assert (a - b.float()).norm() <= 1e-2 * a.norm()
