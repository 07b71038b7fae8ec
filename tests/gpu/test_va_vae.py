"""VA-VAE's encoder in bf16, eager and fused, against fp32; and whole steps with it in line and beside.

Tolerance: a bf16 encoder of random weights is off by a few per cent of the latents' spread, whatever rounds
first. Fused it may not be worse than eager by more than half.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from launch import run

from nextvid_mcore import recipes
from nextvid_mcore.config import ModelConfig, RunConfig, TransformerShape
from nextvid_mcore.data import ClipBatch
from nextvid_mcore.targets import cudnn_conv
from nextvid_mcore.targets.autoencoder import AutoencoderKL
from nextvid_mcore.targets.replayed import Replayed
from nextvid_mcore.targets.va_vae import VaVae

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


def test_the_fused_encoder_equals_the_eager_one() -> None:
    shape = TransformerShape(width=24, depth=1, heads=2, mlp=48)
    model = ModelConfig(encoder=shape, image_size=128, patch_size=16, tubelet_size=2)
    torch.manual_seed(0)
    weights = AutoencoderKL().state_dict()
    video = torch.rand(3, 3, 8, 128, 128, device="cuda") * 2 - 1
    video[1] = video[1, :, :1]
    static = torch.tensor([False, True, False])

    def latents(dtype: torch.dtype, fused: bool) -> torch.Tensor:
        autoencoder = AutoencoderKL()
        autoencoder.load_state_dict(weights)
        target = VaVae(
            model,
            autoencoder.to("cuda", dtype),
            torch.zeros(32),
            torch.ones(32),
            chunk=8,
            fused=fused,
        )
        return target.latents(video, static, first=1)

    exact = latents(torch.float32, False)
    eager, fused = (latents(torch.bfloat16, each) for each in (False, True))
    errors = [float((x - exact).square().mean().sqrt() / exact.std()) for x in (eager, fused)]
    assert exact.shape == (3, 3, 64, 64) and 0 < errors[0] < 0.05
    assert errors[1] < 1.5 * errors[0], errors
    for _ in range(3):  # programs that wait for each other's sums always find all of them
        assert torch.equal(latents(torch.bfloat16, True), fused)


def test_recorded_it_gives_the_same_to_the_bit(caplog) -> None:
    """Of frames that change, on two streams by turns."""
    shape = TransformerShape(width=24, depth=1, heads=2, mlp=48)
    model = ModelConfig(encoder=shape, image_size=128, patch_size=16, tubelet_size=2)
    torch.manual_seed(0)
    autoencoder = AutoencoderKL().to("cuda", torch.bfloat16)
    called, recorded = (
        VaVae(model, autoencoder, torch.zeros(32), torch.ones(32), chunk=4, fused=True, recorded=each)
        for each in (False, True)
    )
    streams = torch.cuda.current_stream(), torch.cuda.Stream()
    wanted, found = [], []
    for i in range(12):
        video = torch.rand(2, 3, 8, 128, 128, device="cuda") * 2 - 1
        wanted.append(called.latents(video, first=1))
        streams[1].wait_stream(streams[0])
        with torch.cuda.stream(streams[i % 2]):
            found.append(recorded.latents(video, first=1))
        streams[0].wait_stream(streams[1])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    (here,) = recorded._network.shapes.values()
    assert here.recording is not None and not caplog.records


@pytest.mark.parametrize(
    ("shape", "channels", "stride", "residual"),
    [
        ((4, 128, 256, 256), 128, 1, True),
        ((3, 512, 16, 16), 512, 1, True),
        ((2, 128, 40, 24), 256, 1, False),
        ((2, 256, 40, 24), 256, 2, False),
    ],
)
def test_a_convolution_adds_residual_and_bias(shape, channels, stride, residual, monkeypatch) -> None:
    """By cuDNN, not by what stands for it where that refuses; and to the bit, a thousand times."""
    monkeypatch.setattr(cudnn_conv, "_warn", None)
    generator = torch.Generator("cuda").manual_seed(0)
    (N, C, H, W), like = shape, {"device": "cuda", "generator": generator}
    x = torch.randn(N, H, W, C, **like).bfloat16().permute(0, 3, 1, 2)
    weight = torch.randn(channels, C, 3, 3, **like).bfloat16() / (3 * C**0.5)
    weight = weight.to(memory_format=torch.channels_last)
    rest = torch.randn(N, H, W, channels, **like).bfloat16().permute(0, 3, 1, 2) if residual else None
    bias = torch.randn(channels, **like).bfloat16()
    first = cudnn_conv.convolve(x, weight, bias, rest, stride)
    wanted = torch.nn.functional.conv2d(x.float(), weight.float(), bias.float(), stride, 1)
    wanted = wanted if rest is None else wanted + rest.float()
    torch.testing.assert_close(first.float(), wanted, rtol=1e-2, atol=2e-2)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (cudnn_conv.convolve(x, weight, bias, rest, stride) != first).any()
    assert int(different) == 0


def test_torch_adds_them_where_cudnn_refuses(monkeypatch, caplog) -> None:
    x = torch.randn(2, 64, 16, 16, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda").bfloat16() / 24
    weight, bias = weight.to(memory_format=torch.channels_last), x[0, :, 0, 0].clone()
    wanted = cudnn_conv.convolve(x, weight, bias, x)

    def refuse(*_: object) -> None:
        raise cudnn_conv.Refused("here")

    monkeypatch.setattr(cudnn_conv, "_plan", refuse)
    cudnn_conv._graphs.cache_clear()
    cudnn_conv._warn.cache_clear()
    for _ in range(2):
        got = cudnn_conv.convolve(x, weight, bias, x)
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert [record.getMessage()[-4:] for record in caplog.records] == ["here"]
    cudnn_conv._graphs.cache_clear()


def losses(graphs: str) -> dict[str, list[float]]:
    """Of steps with clips that change, by place. Nothing is learnt: both begin where the other did."""
    sys.path.insert(0, BENCHMARKS)
    from common import Bench, online_vae_target, quick_start

    from nextvid_mcore.parallel.groups import init_distributed

    init_distributed()

    config = recipes.get("tiny")
    stage = dataclasses.replace(config.stages[0], batch=4, lr_start=0.0, lr_end=0.0)
    config = config.altered(
        stages=(stage,),
        model={"patch_size": 16},
        mask={"keep": (0.5, 0.25)},
        target={"kind": "va_vae", "chunk": 4},
        train={"micro_batch": 2, "init_noise": 0.02, "precision": "bf16", "cuda_graphs": graphs},
    )
    with quick_start(online_vae_target):
        bench = Bench(config)
    step, engine, update = bench.step, bench.step.engine, bench.step.optimizers.step
    stream, found = engine.ahead.stream, {}
    assert engine.target.fused and stream is not None

    def slow(*args: object) -> object:
        torch.cuda._sleep(30_000_000)  # some 15 ms, by which the host is ahead
        return update(*args)

    step.optimizers.step = slow
    for _ in range(2):
        bench.take()
    loaded = engine.target
    assert isinstance(loaded._network, Replayed) == (graphs != "off")
    launched, recorded = (
        VaVae(config.model, loaded.autoencoder, loaded.mean, loaded.std, chunk=4, fused=True, recorded=each)
        for each in (False, True)
    )
    for way, own in (("in line", None), ("beside", stream), ("recorded, beside", stream)):
        engine.ahead.stream = own
        engine.target = recorded if "recorded" in way else launched
        found[way] = [step.run(bench.point, _clips(config, i)).loss_flow for i in range(6)]
    assert (graphs == "on") == any(
        each.recording is not None for each in (engine.graphs._recorded.values() if engine.graphs else ())
    )
    return found


def _clips(config: RunConfig, step: int) -> list[ClipBatch]:
    """Two micro-batches; the second one's video comes to the GPU on a stream of its own."""
    generator = torch.Generator().manual_seed(step)
    shape = (2, 3, config.stages[0].frames, config.model.image_size, config.model.image_size)
    found = [
        ClipBatch(
            video=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).pin_memory(),
            index=torch.arange(2) + 4 * step + 2 * i,
            label=torch.full((2,), -1),
            static=torch.zeros(2, dtype=torch.bool),
            items=[""] * 2,
        )
        for i in range(2)
    ]
    feed = torch.cuda.Stream()
    with torch.cuda.stream(feed):
        torch.cuda._sleep(4_000_000)
        video = found[1].video.to("cuda", non_blocking=True)
    torch.cuda.current_stream().wait_stream(feed)
    video.record_stream(torch.cuda.current_stream())
    found[1] = dataclasses.replace(found[1], video=video)
    return found


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_where_latents_are_made_changes_no_loss(graphs: str) -> None:
    found = run(losses, 1, graphs)[0]
    assert found["in line"] == found["beside"] == found["recorded, beside"], found
    assert len(set(found["in line"])) == len(found["in line"])  # latents of another step would show
