"""The fused pieces as a GPU gets them, at ViT-G's widths in bf16, against what is written in fp32.

Outputs and gradients may differ by bf16's rounding: 1% of a tensor's norm, 2% through attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from einops import rearrange
from torch import Tensor

from nextvid_mcore import rope, switches
from nextvid_mcore.models import fused, kernels
from nextvid_mcore.models.attention import Frames, regular_pattern

S, ROWS = 101, 7  # no multiple of any tile
HEADS = {"encoder": (22, 64), "predictor": (12, 32)}  # heads, width of a head


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def values(function: Callable, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of a fixed projection of them."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    out = function(*(x * 1 for x in leaves))  # rotary pieces write over what they get
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    grads = [torch.randn(x.shape, device="cuda").bfloat16().to(dtype) for x in out]
    return [x.detach() for x in out] + list(torch.autograd.grad(out, leaves, grads))


def pieces() -> Iterator[tuple]:
    """(name, function, its inputs)."""
    torch.manual_seed(0)
    for width in (1408, 384):
        module = torch.nn.LayerNorm(width, device="cuda")

        def with_norm(function: Callable, module: torch.nn.Module = module) -> Callable:
            def call(*args: Tensor) -> object:
                for name in ("weight", "bias"):
                    module._parameters.pop(name, None)
                module.weight, module.bias = args[-2:]
                return function(*args[:-2], module, 1e-5)

            return call

        x, y, row = draw(S, ROWS, width), draw(S, ROWS, width), draw(1, ROWS, width)
        vectors = [draw(width) for _ in range(3)]
        yield f"add {width}", fused.add, [x, y, vectors[0]]
        yield f"norm {width}", with_norm(fused.norm), [x, *vectors[:2]]
        yield f"add_norm {width}", with_norm(fused.add_norm), [x, y, *vectors]
        yield f"modulate {width}", lambda *a: fused.modulate(*a, 1e-6), [x, row, row + 1]
        yield f"gated_add {width}", fused.gated_add, [x, y, vectors[0], row]
    yield "squared_error 1408", fused.squared_error, [draw(S, 2, ROWS, 1408), draw(S, 1, ROWS, 1408)]
    for width in (6144, 1536, 200):
        yield f"bias_gelu {width}", fused.bias_gelu, [draw(S, ROWS, width, scale=3.0), draw(width)]
    tokens = torch.arange(S * ROWS, device="cuda").view(S, ROWS)
    for heads, d in HEADS.values():
        turns = rope.turns(rope.angles(rope.token_positions(tokens, 16, 16), d))
        for parts in (1, 2, 3):
            yield (
                f"rotate_heads {parts} x {heads} x {d}",
                lambda x, parts=parts, heads=heads, turns=turns: fused.rotate_heads(parts, x, heads, turns),
                [draw(S, ROWS, heads * parts * d)],
            )


def far(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, wanted, strict=True)
    ]


def test_compiled_pieces_are_what_is_written() -> None:
    wrong = []
    for name, function, inputs in pieces():
        with fused.eager():
            wanted = values(function, inputs, torch.float32)
        errors = far(values(function, inputs, torch.bfloat16), wanted)
        print(f"{name}: {', '.join(f'{x:.1e}' for x in errors)}")
        if not max(errors) < 1e-2:
            wrong.append((name, errors))
    assert not wrong


def test_pixels_of_a_clip_and_of_its_patches() -> None:
    """Up to fp32's last digit: every value of a byte, 2 clips and then 3."""
    with switches.changed(pixels=True):
        for clips in (2, 3):
            video = torch.randint(0, 256, (clips, 3, 4, 64, 64), dtype=torch.uint8, device="cuda")
            patches = rearrange(video, "b c (t u) (h v) (w x) -> b t h w c u v x", u=2, v=16, x=16)
            assert len(video.unique()) == 256 and not patches.is_contiguous()
            for x in (video, patches):
                for dtype, rtol in ((torch.float32, 0), (torch.bfloat16, 2**-7)):
                    found, wanted = fused.pixels(x, dtype), (x.double() / 127.5 - 1).to(dtype)
                    assert found.is_contiguous()
                    torch.testing.assert_close(found, wanted, rtol=rtol, atol=2e-7)


def test_heads_of_any_width_turn() -> None:
    """And the dimensions that are not turned keep every bit."""
    tokens = torch.arange(S * ROWS, device="cuda").view(S, ROWS)
    for d, dtype in ((8, torch.bfloat16), (24, torch.bfloat16), (64, torch.float32), (128, torch.float16)):
        turns = rope.turns(rope.angles(rope.token_positions(tokens, 16, 16), d))
        kept = 2 * turns.shape[-1]
        packed = draw(S, ROWS, 9 * 3 * d)
        packed.view(S, ROWS, -1, d)[..., kept:] = -0.0

        def turned(x: Tensor, turns: Tensor = turns) -> tuple[Tensor, ...]:
            return fused.rotate_heads(3, x, 9, turns)

        with fused.eager():
            wanted = values(turned, [packed], torch.float32)
        found = values(turned, [packed], dtype)
        errors = far(found, wanted)
        print(d, dtype, errors)
        assert max(errors) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert torch.equal(found[2], wanted[2].to(dtype))  # fp16 has not all that was drawn
        assert all(x[..., kept:].signbit().all() for x in found[:3])


@pytest.mark.parametrize(("heads", "d", "frames", "n"), [(22, 64, 8, 256), (4, 64, 32, 256), (8, 32, 8, 64)])
def test_reference_attention_over_prefixes(heads: int, d: int, frames: int, n: int) -> None:
    """The kernel that whole clips get without a gradient, called and recorded, against fp32 with a mask."""
    from nextvid_mcore.models import gluon_prefix, triton_prefix

    if torch.cuda.get_device_capability() != kernels.HOPPER:
        pytest.skip("other GPUs keep FlexAttention")
    rows, whole = 3, (Frames(0, frames, n),)
    pattern = regular_pattern(whole, whole, "causal", torch.device("cuda"))

    def parts(packed: Tensor) -> list[Tensor]:
        return [x.permute(1, 2, 0, 3) for x in packed.unflatten(2, (heads, 3, d)).unbind(3)]

    def far_from_fp32(out: Tensor) -> float:
        return far([out], [kernels.masked(*(x.float() for x in parts(packed)), pattern)])[0]

    torch.manual_seed(0)
    packed = draw(frames * n, rows, heads * 3 * d)
    assert kernels.choose(parts(packed)[0], pattern) is kernels.stairs  # with a gradient
    with torch.no_grad():
        kernel = kernels.choose(parts(packed)[0], pattern)
        assert kernel is kernels.prefix
        errors = [far_from_fp32(kernel(*parts(packed), pattern))]
        errors += [far_from_fp32(x.attend(*parts(packed), n)) for x in (gluon_prefix, triton_prefix)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel(*parts(packed), pattern)
        packed.copy_(draw(*packed.shape))
        graph.replay()
        errors.append(far_from_fp32(out))
    print(f"{frames} x {n} tokens, {heads} heads of {d}: {errors}")
    assert max(errors) < 1e-2


def test_monitors_compiled() -> None:
    """Cosine and moments at ViT-G's sizes, of a tensor as the predictor gives it, against fp32 as written."""
    from nextvid_mcore.training.monitors import moments

    torch.manual_seed(0)
    z = draw(3 * 64, 2, 4, 384).unflatten(0, (3, 64)).permute(1, 2, 0, 3, 4) + 30
    reference, aligned = draw(64, 1, 3, 4, 1408).float(), draw(64, 2, 3, 4, 1408)
    with fused.eager():
        wanted = moments(z, reference, aligned)
    for found, right in zip(moments(z, reference, aligned), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("width", [384, 200, 1408])  # the last is too wide for our kernels
@pytest.mark.parametrize(("s", "rows"), [(256, 224), (101, 7), (3, 1)])
@pytest.mark.parametrize(("added", "past"), [(True, True), (True, False), (False, True)])
def test_adaln_by_our_kernels(s: int, rows: int, width: int, added: bool, past: bool) -> None:
    """Outputs and every gradient against fp32, and each time the same numbers."""
    torch.manual_seed(0)
    x, y, bias, vectors = draw(s, rows, width), draw(s, rows, width), draw(width), draw(1, rows, 6 * width)

    def between(*leaves: Tensor) -> tuple[Tensor, ...]:
        *stream, vectors = leaves
        shift, scale, gate, *_ = vectors.chunk(6, dim=-1)  # as AdaLN's linear gives them
        given = fused.Added(*stream[1:], gate) if added else None
        return fused.gated_norm(stream[0], given, shift, scale, 1e-6)[1 - past :]

    inputs = [x, y, bias, vectors] if added else [x, vectors]
    with fused.eager():
        wanted = values(between, inputs, torch.float32)
    found = values(between, inputs, torch.bfloat16)
    errors = far(found, wanted)
    print(f"{s} x {rows} x {width}: {', '.join(f'{x:.1e}' for x in errors)}")
    assert max(errors) < 1e-2
    for _ in range(20):
        again = values(between, inputs, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("module", ["gluon_stairs", "triton_stairs"])
@pytest.mark.parametrize(
    ("heads", "d", "queries", "keys"),
    [
        (22, 64, None, (Frames(0, 7, 96), Frames(0, 7, 48))),  # at 16 frames
        (22, 64, None, (Frames(0, 31, 96), Frames(0, 31, 48))),  # ViT-G's student at 64 frames
        (12, 32, (Frames(1, 31, 256),) * 2, (Frames(0, 31, 96), Frames(0, 31, 48))),  # and its predictor
        (12, 32, None, (Frames(0, 1, 256),)),  # a frame of the decoder
        (3, 32, None, (Frames(0, 5, 7), Frames(0, 3, 200), Frames(0, 1, 3))),
        (3, 64, (Frames(1, 7, 256),), (Frames(0, 7, 40),)),
    ],
)
def test_attention_up_stairs(heads: int, d: int, queries: tuple | None, keys: tuple, module: str) -> None:
    """Output and gradients, called and recorded, against fp32 with a mask, and each time the same numbers."""
    attend_by = importlib.import_module(f"nextvid_mcore.models.{module}").attend
    if torch.cuda.get_device_capability() != kernels.HOPPER:
        pytest.skip("other GPUs keep FlexAttention")
    rule = "autoregressive" if queries else "causal"
    pattern = regular_pattern(queries or keys, keys, rule, torch.device("cuda"))
    visible, asked = (sum(x.number * x.tokens for x in side) for side in (keys, queries or keys))
    torch.manual_seed(0)
    shapes = [(asked, 2, heads * (1 if queries else 3) * d)] + [(visible, 2, heads * 2 * d)] * bool(queries)

    def both(attend: Callable, packed: list[Tensor], dout: Tensor) -> list[Tensor]:
        leaves = [x.detach().to(dout.dtype).requires_grad_() for x in packed]
        parts = [y for x in leaves for y in x.unflatten(2, (heads, -1, d)).unbind(3)]
        out = attend(*(x.permute(1, 2, 0, 3) for x in parts), pattern).permute(2, 0, 1, 3)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def passes(packed: list[Tensor], dout: Tensor) -> list[Tensor]:
        return both(lambda q, k, v, pattern: attend_by(q, k, v, pattern.stairs), packed, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        stream
    ):  # autograd waits for the stream of the leaves, which must not be the default
        packed, dout = [draw(*x) for x in shapes], draw(asked, 2, heads, d)
        called = passes(packed, dout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            recorded = passes(packed, dout)
        for x in recorded:
            x.zero_()
        graph.replay()
        wanted = both(kernels.masked, packed, dout.float())
    torch.cuda.synchronize()
    errors = far(called, wanted)
    print(f"{heads} heads of {d}, {asked} queries, {visible} keys: {errors}")
    assert max(errors) < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(called, recorded, strict=True))


@pytest.mark.parametrize("kind", ["student", "predictor", "decoder"])
def test_attention_of_turned_heads(kind: str) -> None:
    """From a linear's output to attention's, by the kernels that a network gets, against fp32."""
    heads, d = HEADS["encoder" if kind == "student" else "predictor"]
    visible, asked = (Frames(0, 7, 96), Frames(0, 7, 48)), (Frames(1, 7, 256),) * 2
    device = torch.device("cuda")
    queries, rows = {"student": (1008, 2), "predictor": (3584, 2), "decoder": (256, 14)}[kind]
    pattern = {
        "student": lambda: regular_pattern(visible, visible, "causal", device),
        "predictor": lambda: regular_pattern(asked, visible, "autoregressive", device),
        "decoder": lambda: None,
    }[kind]()
    keys = 256 if kind == "decoder" else 1008

    def turns(s: int) -> Tensor:
        tokens = torch.arange(s * rows, device=device).view(s, rows)
        return rope.turns(rope.angles(rope.token_positions(tokens, 16, 16), d))

    used = []

    def attend(*packed: Tensor) -> Tensor:
        if len(packed) == 1:
            q, k, v = fused.rotate_heads(3, packed[0], heads, turns(queries))
        else:
            (q,) = fused.rotate_heads(1, packed[0], heads, turns(queries))
            k, v = fused.rotate_heads(2, packed[1], heads, turns(keys))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        used.append(kernels.choose(q, pattern))
        out = used[-1](q, k, v, pattern).permute(2, 0, 1, 3)
        return out.reshape(queries, rows, heads * d)

    torch.manual_seed(0)
    inputs = [draw(queries, rows, heads * 3 * d)]
    if kind == "predictor":
        inputs = [draw(queries, rows, heads * d), draw(keys, rows, heads * 2 * d)]
    with fused.eager():
        wanted = values(attend, inputs, torch.float32)
    errors = far(values(attend, inputs, torch.bfloat16), wanted)
    print(kind, used[-1].__name__, errors)
    assert used[-1] is not used[0] and max(errors) < 2e-2
