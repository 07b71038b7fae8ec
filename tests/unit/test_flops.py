"""flops.py: the paper's parameter counts, the known FLOPs per clip, and both against real torch modules."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from unit.narrow_vae import clip, make_narrow

from nextvid_mcore import flops, recipes
from nextvid_mcore.config import MaskConfig, TargetConfig
from nextvid_mcore.targets import va_vae
from nextvid_mcore.targets.va_vae import VaVae

PAPER = ("vit_l", "vit_h", "vit_g")


@pytest.mark.parametrize(
    "name, encoder, predictor",
    [("vit_l", 303.9, 22.1), ("vit_h", 631.6, 22.3), ("vit_g", 1012.2, 22.4)],
)
def test_parameters_of_the_paper(name, encoder, predictor):
    config = recipes.get(name)
    assert flops.target_channels(config) == 64
    count = flops.parameters(config.model, 64)
    assert round(count.encoder / 1e6, 1) == encoder
    assert round(count.predictor_of_paper / 1e6, 1) == predictor
    assert round(count.decoder / 1e6, 1) == 32.7
    assert count.student - count.encoder == count.predictor_of_paper - count.predictor > 0


def test_parameters_against_torchs_own_layer():
    """torch's pre-norm encoder layer has the encoder's parameters, one for one."""
    model = recipes.get("vit_h").model
    with torch.device("meta"):
        e = model.encoder
        layer = nn.TransformerEncoderLayer(e.width, e.heads, e.mlp, norm_first=True)
        rest = [nn.Linear(model.patch_dim, e.width), nn.LayerNorm(e.width)]
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert flops.parameters(model, 64).encoder == e.depth * count(layer) + sum(map(count, rest))


# TFLOP per clip, both masks, at tau 4, tau 1 and 64 frames with tau 1 (known as 6.3, 4.7, 24 and so on)
TABLE = {"vit_l": (6.25, 4.7, 24), "vit_h": (10.1, 8.6, 42), "vit_g": (14.6, 13.0, 62)}


@pytest.mark.parametrize("name", PAPER)
def test_nominal_flops_per_clip(name):
    config = recipes.get(name)
    _, four, one, long = (flops.clip_flops(config, stage).total / 1e12 for stage in config.stages)
    for got, want, unit in zip((four, one, long), TABLE[name], (0.1, 0.1, 1), strict=True):
        assert got == pytest.approx(want, abs=0.6 * unit)


def test_who_does_the_work():
    """The shares that decide placement."""
    g, large = recipes.get("vit_g"), recipes.get("vit_l")
    four, one = flops.clip_flops(g, g.stages[1]), flops.clip_flops(g, g.stages[2])
    assert four.student / 1e12 == pytest.approx(7.4, abs=0.06)
    assert (four.total - four.student) / 1e12 == pytest.approx(7.2, abs=0.06)
    light = lambda x: (x.predictor + x.decoder) / x.total  # noqa: E731
    assert light(one) == pytest.approx(0.08, abs=0.006)
    assert light(four) == pytest.approx(0.17, abs=0.006)
    assert light(flops.clip_flops(large, large.stages[1])) == pytest.approx(0.40, abs=0.006)
    assert one.reference / one.total == pytest.approx(0.36, abs=0.006)


def test_executed_is_less_by_the_dropped_frame_and_the_fixed_counts():
    config = recipes.get("vit_g")
    stage = config.stages[2]
    nominal, executed = (flops.clip_flops(config, stage, executed=flag) for flag in (False, True))
    assert executed.total / nominal.total == pytest.approx(0.92, abs=0.01)
    assert executed.reference == nominal.reference and executed.decoder == nominal.decoder
    assert executed.student < 0.89 * nominal.student
    # With as many tokens as the nominal figure has, only the last frame's share is left: 7 / 8 of the
    # linears and 28 / 36 of the attention.
    packed = replace(config, mask=MaskConfig(mode="packed"))
    ratio = flops.clip_flops(packed, stage, executed=True).student / nominal.student
    assert 28 / 36 < ratio < 7 / 8


def test_executed_counts_by_hand():
    """ViT-L's student at 16 frames: 96 and 48 tokens in each of 7 frames."""
    config = recipes.get("vit_l")
    want = 0
    for v in (96, 48):
        tokens, pairs = 7 * v, 28 * v * v
        want += 24 * (2 * 12 * 1024**2 * tokens + 4 * 1024 * pairs) + 2 * 1536 * 1024 * tokens
        want += 2 * 1024 * 384 * tokens
    assert flops.clip_flops(config, config.stages[0], executed=True).student == 3 * want


def test_tau_samples_multiply_the_decoder_alone():
    config = recipes.get("vit_h")
    four, one = (flops.clip_flops(config, config.stages[i]) for i in (1, 2))
    assert four.decoder == pytest.approx(4 * one.decoder)
    assert (four.student, four.reference, four.predictor) == (one.student, one.reference, one.predictor)


def attend(queries: int, keys: int, width: int) -> None:
    q, k = torch.empty(queries, width, device="meta"), torch.empty(keys, width, device="meta")
    (q @ k.T) @ k


def test_formulas_against_torchs_flop_counter():
    """The decoder's and the predictor's matrix products, run one by one on the meta device, tiny sizes."""
    config = recipes.get("tiny")
    model, stage, n = config.model, config.stages[0], 64
    E, D, C, t = 48, 96, flops.target_channels(config), model.token_frames(stage.frames)
    p, frames = t - 1, (t - 1) * stage.tau_samples
    assert (t, C) == (4, 3 * 2 * 8 * 8)

    def linear(rows: int, inputs: int, outputs: int) -> None:
        with torch.device("meta"):
            functional.linear(torch.empty(rows, inputs), torch.empty(outputs, inputs))

    with FlopCounterMode(display=False) as counter:
        for _ in range(2 * frames):  # masks x predicted frames x tau samples
            linear(1, 256, E), linear(1, E, E), linear(1, E, 2 * E)
            linear(n, E + C, E), linear(n, E, C)
            for _ in range(2):
                linear(1, E, 6 * E), linear(n, E, 3 * E), linear(n, E, E)
                linear(n, E, 192), linear(n, 192, E)
                attend(n, n, E)
    got = flops.clip_flops(config, stage, executed=True)
    assert got.decoder == 3 * counter.get_total_flops()

    with FlopCounterMode(display=False) as counter:
        for v in config.mask.counts(n):
            linear(p * n, E, D)
            for _ in range(2):
                linear(p * n, E, E), linear((t - 1) * v, E, 2 * E), linear(p * n, E, E)
                linear(p * n, E, 192), linear(p * n, 192, E)
                for earlier in range(1, t):
                    attend(n, earlier * v, E)
    assert got.predictor == 3 * counter.get_total_flops()


def test_target_flops():
    """VA-VAE's encoder online: 138 GFLOP a frame, for all frames but token frame 0's; pixels cost nothing."""
    config = recipes.get("vit_g")
    sixteen, long = (flops.target_flops(config, config.stages[i]) / 1e12 for i in (2, 3))
    assert sixteen == pytest.approx(14 * 0.1379, rel=0.001)
    assert long == pytest.approx(62 / 14 * sixteen)
    pixels = replace(config, target=TargetConfig(kind="pixels"))
    assert flops.target_flops(pixels, config.stages[2]) == 0
    assert flops.target_channels(pixels) == 1536


def test_an_autoencoder_of_ones_own_is_counted_by_its_sizes(tmp_path):
    """Not by VA-VAE's, but as torch counts it at work (but the CPU's fused attention, which it doesn't)."""
    narrow, file = make_narrow(), tmp_path / "autoencoder.pt"
    torch.save(narrow.state_dict(), file)
    tiny = recipes.get("tiny").altered(
        model={"patch_size": 16}, target={"kind": "va_vae", "checkpoint": str(file)}
    )
    target = VaVae(tiny.model, narrow, torch.zeros(4), torch.ones(4))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        target.latents(clip((1, 3, tiny.stages[0].frames, 64, 64)), first=1)
    assert flops.target_flops(tiny, tiny.stages[0]) == counter.get_total_flops() > 1e6
    with mock.patch.object(va_vae, "read_tensors", side_effect=AssertionError("read again")):
        assert flops.target_channels(tiny) == 8
