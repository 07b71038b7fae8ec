"""What a token of VA-VAE's latents stands for, on a narrow autoencoder of the same structure."""

from __future__ import annotations

import pytest
import torch
from unit.narrow_vae import NARROW, clip, make_narrow

from nextvid_mcore.config import ConfigError, ModelConfig, TransformerShape
from nextvid_mcore.targets.autoencoder import AutoencoderKL
from nextvid_mcore.targets.fused_vae import FusedEncoder
from nextvid_mcore.targets.va_vae import VaVae

MEAN, STD = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([2.0, 0.5, 1.0, 4.0])


def model(image: int = 64, tubelet: int = 2) -> ModelConfig:
    shape = TransformerShape(width=24, depth=1, heads=2, mlp=48)
    return ModelConfig(encoder=shape, image_size=image, patch_size=16, tubelet_size=tubelet)


@pytest.fixture(scope="module")
def narrow() -> AutoencoderKL:
    return make_narrow()


@pytest.fixture
def target(narrow: AutoencoderKL) -> VaVae:
    return VaVae(model(), narrow, MEAN, STD, chunk=5)


def test_shapes_and_no_gradient(target):
    video = clip((2, 3, 4, 64, 64)).requires_grad_()
    latents = target.latents(video)
    assert latents.shape == (2, 2, 16, 8) and latents.dtype == torch.float32 and not latents.requires_grad
    decoded = target.decode(latents)
    assert decoded.shape == video.shape and decoded.dtype == torch.float32 and not decoded.requires_grad


@pytest.mark.parametrize("tubelet", [1, 2, 4])
def test_tokens_are_normalised_frames_stacked_in_order(narrow, tubelet):
    video = clip((2, 3, 4, 64, 64))
    latents = VaVae(model(tubelet=tubelet), narrow, MEAN, STD, chunk=3).latents(video)
    assert latents.shape == (2, 4 // tubelet, 16, 4 * tubelet)
    for b, frame in ((0, 0), (0, 1), (1, 2), (1, 3)):
        with torch.no_grad():
            mean = narrow.encode(video[b, :, frame][None])[0][0]  # [z, h, w]
        wanted = ((mean - MEAN[:, None, None]) / STD[:, None, None]).flatten(1).T  # [n, z]
        part = latents[b, frame // tubelet, :, frame % tubelet * 4 :][:, :4]
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5)


def test_decode_undoes_normalisation_and_stacking(target, narrow):
    video = clip((1, 3, 4, 64, 64))
    decoded = target.decode(target.latents(video))
    with torch.no_grad():
        wanted = torch.stack([narrow(video[:, :, i]) for i in range(4)], dim=2)
    torch.testing.assert_close(decoded, wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def averaging_autoencoder() -> AutoencoderKL:
    """Weights made by hand: a latent position holds (a norm of) the mean colour of its 16 x 16 pixels."""
    made = AutoencoderKL(NARROW)
    for name, weight in made.named_parameters():
        if ".norm" not in name:
            weight.zero_()  # residual branches and attention are silent
    colours = range(3)
    for i in colours:
        made.encoder.conv_in.weight[i, i, 1, 1] = 1
        made.encoder.conv_out.weight[i, i, 1, 1] = 1
        made.quant_conv.weight[i, i] = 1
        for level in made.encoder.down:
            if hasattr(level, "downsample"):
                level.downsample.conv.weight[i, i, :2, :2] = 0.25
            if hasattr(level.block[0], "nin_shortcut"):
                level.block[0].nin_shortcut.weight[i, i] = 1
    return made


def test_a_token_stands_for_the_pixels_at_its_place():
    """Random weights smear a patch over the whole frame, so these are made by hand."""
    target = VaVae(model(image=128), averaging_autoencoder(), torch.zeros(4), torch.ones(4), chunk=3)
    video = clip((1, 3, 4, 128, 128))
    before = target.latents(video)[0]  # [t, n, (k z)]
    for frame, y, x in ((0, 0, 0), (1, 6, 2), (2, 1, 7), (3, 4, 4)):
        changed = video.clone()
        changed[0, :, frame, y * 16 : y * 16 + 16, x * 16 : x * 16 + 16] += 0.2
        move = target.latents(changed)[0] - before
        for other in {0, 1, 2, 3} - {frame}:  # frames do not see each other
            assert not move[other // 2, :, other % 2 * 4 :][:, :4].any()
        size = move[frame // 2, :, frame % 2 * 4 :][:, :3].abs().amax(-1).reshape(8, 8)
        rest = size.flatten()[torch.arange(64) != y * 8 + x]
        assert size[y, x] > 1 and rest.max() < 0.25 * size[y, x], (size[y, x], rest.max())


def test_a_static_clip_runs_once_and_equals_all_its_frames(target, narrow):
    video = clip((3, 3, 4, 64, 64))
    static = torch.tensor([True, False, True])
    video[static] = video[static][:, :, :1].expand(-1, -1, 4, -1, -1)
    everything = target.latents(video)
    frames = []
    handle = narrow.encoder.conv_in.register_forward_hook(lambda _m, args, _o: frames.append(len(args[0])))
    try:
        once = target.latents(video, static=static)
    finally:
        handle.remove()
    assert sum(frames) == 1 + 4 + 1 and max(frames) <= 5
    torch.testing.assert_close(once, everything, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(everything[0], everything[2])  # the clips do differ
    with pytest.raises(ConfigError, match="static must be bool"):
        target.latents(video, static=torch.tensor([1, 0, 1]))


def test_chunks_change_nothing(narrow):
    video = clip((2, 3, 4, 64, 64))
    small, large = (VaVae(model(), narrow, MEAN, STD, chunk=c) for c in (3, 64))
    torch.testing.assert_close(small.latents(video), large.latents(video), rtol=1e-5, atol=1e-5)


def test_frames_left_out_are_not_encoded_and_change_nothing(narrow):
    video = clip((2, 3, 6, 64, 64))
    video[1] = video[1][:, :1]
    static = torch.tensor([False, True])
    target = VaVae(model(), narrow, MEAN, STD, sample_posterior=True, chunk=64)
    whole = target.latents(video, static, indices=[3, 4])
    frames = []
    handle = narrow.encoder.conv_in.register_forward_hook(lambda _m, args, _o: frames.append(len(args[0])))
    try:
        rest = target.latents(video, static, indices=[3, 4], first=1)
    finally:
        handle.remove()
    assert frames == [4 + 1] and rest.shape[1] == 2
    torch.testing.assert_close(rest, whole[:, 1:], rtol=1e-5, atol=1e-5)


def test_the_fused_encoder_runs_chunks_of_one_size_and_agrees(narrow, monkeypatch):
    shapes = []
    call = FusedEncoder.__call__

    def counted(self, frames):
        shapes.append(tuple(frames.shape))
        return call(self, frames)

    monkeypatch.setattr(FusedEncoder, "__call__", counted)
    video = clip((2, 3, 2, 32, 32))
    static = torch.tensor([False, True])
    video[1] = video[1][:, :1]
    fused, eager = (VaVae(model(image=32), narrow, MEAN, STD, chunk=2, fused=each) for each in (True, False))
    got, wanted = (target.latents(video, static) for target in (fused, eager))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert shapes == [(2, 3, 32, 32)] * 2  # 3 frames and a copy
    assert torch.equal(fused.decode(got), eager.decode(got))


def test_posterior_samples_depend_on_seed_and_index_alone(narrow):
    def sampler(seed: int) -> VaVae:
        return VaVae(model(), narrow, MEAN, STD, sample_posterior=True, seed=seed)

    video = clip((2, 3, 1, 64, 64)).expand(2, 3, 4, 64, 64)
    drawn = sampler(1).latents(video, indices=[7, 9])
    alone = sampler(1).latents(video[1:], static=torch.tensor([True]), indices=torch.tensor([9]))
    torch.testing.assert_close(alone[0], drawn[1], rtol=1e-5, atol=1e-5)
    mode = VaVae(model(), narrow, MEAN, STD).latents(video)
    noise = {}
    for name, draw in {"seed": sampler(2).latents(video, indices=[7, 9]), "same": drawn}.items():
        noise[name] = (draw - mode)[0]
    other_clip = (drawn - mode)[1]
    assert not torch.allclose(noise["seed"], noise["same"]) and not torch.allclose(other_clip, noise["same"])
    assert not torch.allclose(noise["same"][0], noise["same"][1])  # frames of a static clip too
    with pytest.raises(ConfigError, match="global index"):
        sampler(1).latents(video)


def test_posterior_samples_have_the_posteriors_spread(narrow):
    spread = AutoencoderKL(NARROW)
    spread.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        spread.quant_conv.bias[4:] += torch.tensor([-3.0, -1.0, 1.0, 3.0])
    target = VaVae(model(), spread, torch.zeros(4), torch.ones(4), sample_posterior=True)
    video = clip((1, 3, 2, 64, 64)).expand(32, 3, 2, 64, 64)
    drawn = target.latents(video, indices=range(32))
    with torch.no_grad():
        mean, logvar = spread.encode(video[0].transpose(0, 1))
    wanted = (0.5 * logvar).exp().permute(2, 3, 0, 1).flatten(2).flatten(0, 1)  # [n, (k z)]
    centre = mean.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
    score = (drawn[:, 0] - centre) / wanted
    assert abs(score.mean()) < 0.06 and abs(score.std() - 1) < 0.05


def test_the_log_variance_is_clamped(narrow):
    extreme = AutoencoderKL(NARROW)
    extreme.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        extreme.quant_conv.bias[4:6], extreme.quant_conv.bias[6:] = 1e4, -1e4
        logvar = extreme.encode(clip((1, 3, 64, 64)))[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


def test_bf16_follows_fp32(narrow):
    half = AutoencoderKL(NARROW)
    half.load_state_dict(narrow.state_dict())
    video = clip((1, 3, 2, 64, 64))
    exact = VaVae(model(), narrow, MEAN, STD).latents(video)
    rough = VaVae(model(), half.to(torch.bfloat16), MEAN, STD).latents(video)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
