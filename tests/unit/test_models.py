"""The networks' properties on one rank: causality, isolation, exactness of what is left out."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from einops import rearrange
from torch import Tensor

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, MaskConfig, RunConfig, TransformerShape
from nextvid_mcore.masking import ClipMasks, draw_masks
from nextvid_mcore.models import carried, fused, kernels, padded, specs
from nextvid_mcore.models.nextvid import MicroBatch, NextVid
from nextvid_mcore.models.places import together
from nextvid_mcore.models.sequences import (
    by_mask,
    patchify,
    predictor_sequence,
    student_sequence,
    visible_patches,
)
from nextvid_mcore.models.specs import Split
from nextvid_mcore.parallel.groups import Layout, build_groups, init_distributed, seed_trackers

T_TOKENS, CHANNELS = 4, 12


@pytest.fixture(scope="module")
def groups():
    init_distributed()
    groups = build_groups(Layout())
    seed_trackers(0, groups)
    return groups.collection


def small(mode: str = "fixed", **train: object) -> RunConfig:
    """Grid 8 x 8, two layers, every zero-initialised tensor filled with noise."""
    config = recipes.get("tiny")
    shape = TransformerShape(width=48, depth=2, heads=2, mlp=96)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder=shape, predictor=shape, decoder=shape),
        mask=dataclasses.replace(config.mask, mode=mode),
        train=dataclasses.replace(config.train, init_noise=0.02, **train),
    )


def build(config: RunConfig, groups) -> NextVid:
    model = NextVid(config, together(Split(), groups), CHANNELS)
    model.reset_parameters()
    return model


def video_of(config: RunConfig, clips: int = 2, seed: int = 3) -> Tensor:
    size = config.model.image_size
    frames = T_TOKENS * config.model.tubelet_size
    return torch.rand(clips, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def micro_batch(
    config: RunConfig, model: NextVid, video: Tensor, mask_frames: int, taus: int = 2
) -> MicroBatch:
    patches = patchify(video, config.model)
    index = list(range(10, 10 + len(video)))
    masks = draw_masks(config.mask, config.model.grid, mask_frames, config.train.seed, index)
    generator = torch.Generator().manual_seed(5)
    shape = (len(video), T_TOKENS - 1, config.model.tokens_per_frame, CHANNELS)
    latents = torch.randn(shape, generator=generator)
    return MicroBatch(
        index=index,
        seed=config.train.seed,
        token_frames=T_TOKENS,
        tau_samples=taus,
        masks=masks,
        patches=visible_patches(patches, masks),
        features=model.reference_features(patches.transpose(0, 1), T_TOKENS, len(video)),
        latents=latents,
    )


def z_of(model: NextVid, video: Tensor, masks: ClipMasks) -> Tensor:
    """[n, M, p, B, E]."""
    device = torch.device("cpu")
    patches = visible_patches(patchify(video, model.run.model), masks)
    context = model.student(patches, student_sequence(model.run.model, masks, device))
    sequence = predictor_sequence(model.run.model, masks, T_TOKENS, device)
    return by_mask(model.predictor(context, sequence), masks, T_TOKENS - 1, len(video))


def test_no_parameter_is_left_at_zero(groups):
    model = build(small(), groups)
    for name, parameter in model.named_parameters():
        assert parameter.abs().sum() > 0, name


def test_start_is_a_function_of_the_seed(groups):
    a, b, c = (build(small(seed=seed), groups).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))
    assert not torch.equal(a["predictor.align_head.weight"], c["predictor.align_head.weight"])


def test_fresh_model_starts_at_zero_where_the_paper_says(groups):
    config = dataclasses.replace(small(), train=recipes.get("tiny").train)
    state = build(config, groups).state_dict()
    assert state["predictor.query"].abs().sum() == 0
    assert state["decoder.output.weight"].abs().sum() == 0
    assert state["decoder.block.layers.1.adaln.weight"].abs().sum() == 0
    assert state["decoder.final_adaln.weight"].abs().sum() == 0
    assert state["student.encoder.block.layers.1.mlp.linear_fc1.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state["student.encoder.block.layers.1.mlp.linear_fc2.weight"].std() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(state["reference.patch_embed.weight"], state["student.encoder.patch_embed.weight"])


@pytest.mark.parametrize("frame", [1, 2])
def test_changing_a_frame_changes_no_earlier_context(groups, frame):
    config = small()
    model = build(config, groups)
    video = video_of(config)
    other = video.clone()
    start = frame * config.model.tubelet_size
    other[:, :, start : start + config.model.tubelet_size] *= -1
    masks = draw_masks(config.mask, config.model.grid, T_TOKENS, 0, [0, 1])
    sequence = student_sequence(config.model, masks, torch.device("cpu"))
    a, b = (
        model.student(visible_patches(patchify(v, config.model), masks), sequence) for v in (video, other)
    )
    changed = (a - b).abs().amax(-1) > 1e-6  # [s, B]
    assert torch.equal(changed.T, masks.frames >= frame)


@pytest.mark.parametrize("context", ["isolated", "joint"])
@pytest.mark.parametrize("mode", ["fixed", "packed", "truncate", "none"])
@pytest.mark.parametrize("frame", [1, 2])
def test_changing_a_frame_changes_no_prediction_up_to_it(groups, context, mode, frame):
    config = small(mode).altered(model={"context": context})
    model = build(config, groups)
    video = video_of(config)
    other = video.clone()
    start = frame * config.model.tubelet_size
    other[:, :, start : start + config.model.tubelet_size] *= -1
    masks = draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [0, 1])
    difference = (z_of(model, video, masks) - z_of(model, other, masks)).abs().amax((0, 1, 3, 4))  # [p]
    # entry i predicts frame i + 1, from contexts 0 .. i
    assert (difference[:frame] == 0).all()
    if mode != "truncate":  # the cut may leave a mask nothing of a late frame
        assert (difference[frame:] > 1e-6).all()


@pytest.mark.parametrize("mode", ["packed", "truncate"])
def test_a_clip_sees_itself_alone(groups, mode):
    config = small(mode)
    model = build(config, groups)
    video = video_of(config)
    other = torch.cat([video[:1], -video[1:]])
    masks = draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [0, 1])
    a, b = z_of(model, video, masks), z_of(model, other, masks)
    torch.testing.assert_close(a[:, :, :, 0], b[:, :, :, 0])
    assert (a[:, :, :, 1] - b[:, :, :, 1]).abs().max() > 1e-4


def test_packed_equals_fixed_clip_by_clip(groups):
    """The ragged row gives what each clip gives alone."""
    config = small("packed")
    model = build(config, groups)
    video = video_of(config, clips=3)
    together = z_of(model, video, draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [4, 5, 6]))
    for i in range(3):
        masks = draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [4 + i])
        torch.testing.assert_close(
            z_of(model, video[i : i + 1], masks)[:, :, :, 0], together[:, :, :, i], atol=1e-5, rtol=1e-5
        )


def test_packed_in_one_call_equals_the_reference(groups, monkeypatch):
    """Losses and gradients of padded stretches are those of a call a stretch, in fp32."""
    config = small("packed").altered(model={"init_std": 0.2}, train={"init_noise": 0.2})  # attention shows
    calls = []

    def counted(q, k, v, pattern):
        calls.append(len(pattern.stretches))
        return padded.attend(q, k, v, pattern)

    def results(choose) -> tuple[Tensor, dict[str, Tensor]]:
        monkeypatch.setattr(kernels, "choose", choose)
        model = build(config, groups)
        batch = micro_batch(config, model, video_of(config, clips=3), T_TOKENS - 1)
        assert len({x.length for x in batch.masks.segments}) > 2
        loss = model(batch).total(config)
        loss.backward()
        return loss, {k: p.grad for k, p in model.named_parameters() if p.requires_grad}

    chosen = kernels.choose
    wanted, exact = results(lambda q, p: kernels.plain if p is None else kernels.masked)
    found, grads = results(lambda q, p: counted if chosen(q, p) is padded.attend else chosen(q, p))
    assert calls == [6, 6, 6, 6]  # two layers of either network
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for name, grad in exact.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=name)


def test_masks_are_separate_stretches(groups):
    """Hiding one mask's tokens changes nothing for the other."""
    config = small()
    model = build(config, groups)
    video = video_of(config)
    both = draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [0, 1])
    z = z_of(model, video, both)
    first = both.segments[0]
    alone = dataclasses.replace(
        both, tokens=both.of(first), segments=(dataclasses.replace(first, start=0),), counts=both.counts[:1]
    )
    torch.testing.assert_close(z_of(model, video, alone)[:, 0], z[:, 0], atol=1e-6, rtol=1e-5)


def test_decoder_frames_do_not_see_each_other(groups):
    config = small()
    model = build(config, groups)
    n, rows = config.model.tokens_per_frame, 6
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, rows, config.model.predictor.width, generator=generator)
    noisy = torch.randn(n, rows, CHANNELS, generator=generator)
    tau = torch.rand(rows, generator=generator)
    out = model.decoder(z, noisy, tau)
    noisy2, z2 = noisy.clone(), z.clone()
    noisy2[0, 2] += 1.0
    z2[1, 4] += 1.0
    changed = (model.decoder(z2, noisy2, tau) - out).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, False, True, False]
    inside = (model.decoder(z, noisy2, tau) - out).abs().amax(-1)[:, 2]
    assert (inside > 0).all()  # within a frame attention is full


def test_decoder_reads_tau(groups):
    config = small()
    model = build(config, groups)
    z = torch.randn(config.model.tokens_per_frame, 2, config.model.predictor.width)
    noisy = torch.randn(config.model.tokens_per_frame, 2, CHANNELS)
    a = model.decoder(z, noisy, torch.tensor([0.2, 0.5]))
    b = model.decoder(z, noisy, torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert (a[:, 1] - b[:, 1]).abs().max() > 1e-5


@pytest.mark.parametrize("mode", ["fixed", "packed"])
def test_dropping_the_last_frame_from_the_student_is_lossless(groups, mode):
    config = small(mode)
    results = []
    for frames in (T_TOKENS, T_TOKENS - 1):
        model = build(config, groups)
        terms = model(micro_batch(config, model, video_of(config), frames))
        terms.total(config).backward()
        results.append((terms, {k: p.grad for k, p in model.named_parameters() if p.requires_grad}))
    (full, full_grads), (cut, cut_grads) = results
    torch.testing.assert_close(full.total(config), cut.total(config), rtol=1e-6, atol=0)
    for name, grad in cut_grads.items():
        scale = full_grads[name].abs().max()
        assert scale > 0, name
        assert (grad - full_grads[name]).abs().max() <= 1e-5 * scale, name


def test_context_hears_the_decoder_only_through_z(groups):
    config = small()
    model = build(config, groups)
    batch = micro_batch(config, model, video_of(config), T_TOKENS - 1)
    sequence = student_sequence(config.model, batch.masks, torch.device("cpu"))
    context = model.student(batch.patches, sequence).detach().requires_grad_()
    caught = []
    model.predictor.register_forward_hook(lambda module, args, out: caught.append(out) or out.detach())
    terms = model.losses(context, batch)
    assert caught[0].grad_fn is not None
    assert terms.flow.grad_fn is not None  # the decoder's own parameters
    terms.flow.mean().backward()
    assert context.grad is None
    del model.predictor._forward_hooks[next(iter(model.predictor._forward_hooks))]
    model.losses(context, batch).flow.mean().backward()
    assert context.grad.abs().max() > 0


def test_reference_gets_no_gradient_and_targets_are_normed(groups):
    config = small()
    model = build(config, groups)
    batch = micro_batch(config, model, video_of(config), T_TOKENS - 1)
    terms = model(batch)
    terms.total(config).backward()
    assert all(p.grad is None for p in model.reference.parameters())
    assert terms.target.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(
        terms.target.var(-1, unbiased=False).mean(), torch.tensor(1.0), rtol=1e-2, atol=0
    )


def test_losses_are_means_whatever_the_micro_batch(groups):
    config = small()
    model = build(config, groups)
    video = video_of(config, clips=2)
    both = model(micro_batch(config, model, video, T_TOKENS - 1))
    assert both.flow.shape == (2, 2, T_TOKENS - 1, 2) and both.align.shape == (2, 2, T_TOKENS - 1)
    alone = model(micro_batch(config, model, video[:1], T_TOKENS - 1))
    torch.testing.assert_close(both.align[:1], alone.align, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.tau[:1], alone.tau)
    expected = 0.5 * both.flow.mean() + both.align.mean()
    torch.testing.assert_close(both.total(config), expected)


@pytest.mark.parametrize("recompute", ["none", "pieces", "full"])
def test_a_layers_last_addition_is_left_to_the_next(groups, monkeypatch, recompute):
    """All but the last of a block's layers leave it, with the same gradients to the bit as if none did."""
    config, found, left = small(), {}, []
    add, leave = fused.add, carried.left
    for way in ("added", "left"):

        def given(layer, *stream, way=way):
            x = leave(layer, *stream) if way == "left" else add(*stream)
            left.append(layer.behind is not None and layer.behind.added is not None)
            return x

        monkeypatch.setattr(carried, "left", given)
        model = NextVid(config, together(Split(recompute=recompute), groups), CHANNELS)
        model.reset_parameters()
        model.train()
        model.student.encoder.block.layers[0].register_full_backward_hook(
            lambda *_: None
        )  # copies the output
        left.clear()
        terms = model(micro_batch(config, model, video_of(config), T_TOKENS))
        forward = list(left)
        (terms.flow.mean() + terms.align.mean()).backward()
        found[way] = [p.grad for p in model.parameters() if p.grad is not None]
    # two layers each of the reference, the student and the predictor
    assert forward == [recompute != "full", False] * 3
    assert len(found["left"]) > 50 and all(map(torch.equal, found["added"], found["left"]))


def test_patch_order_is_channel_time_row_column():
    config = small()
    m = config.model
    video = video_of(config)
    patches = patchify(video, m)
    token = (1 * m.grid + 2) * m.grid + 3  # frame 1, row 2, column 3
    cube = video[0, :, 2:4, 2 * m.patch_size : 3 * m.patch_size, 3 * m.patch_size : 4 * m.patch_size]
    torch.testing.assert_close(patches[0, token], rearrange(cube, "c t y x -> (c t y x)"))


@pytest.mark.parametrize(
    ("recipe", "encoder", "predictor"),
    [("vit_l", 303.9, 22.1), ("vit_h", 631.6, 22.3), ("vit_g", 1012.2, 22.4)],
)
def test_parameters_of_the_papers_models(groups, recipe, encoder, predictor):
    """Counted on the meta device (Table 7: 300M, 600M, 1.1B; 22M; 33M)."""
    config = recipes.get(recipe)
    with torch.device("meta"):
        model = NextVid(config, together(Split(), groups), 64)

    def millions(*modules: torch.nn.Module) -> float:
        return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 1)

    assert millions(model.student.encoder) == encoder
    assert millions(model.reference) == encoder
    assert millions(model.predictor, model.student.context_projection) == predictor
    assert millions(model.decoder) == 32.7


def test_te_backend_says_what_it_misses(groups):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here: tests/gpu runs the te backend")
    config = small()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backend="te"))
    with pytest.raises(ConfigError, match="backend te needs .*--model.backend local"):
        build(config, groups)


@pytest.mark.parametrize(
    ("cuda", "installed", "backend", "why"),
    [
        (False, True, "local", "no CUDA GPU is visible"),
        (True, False, "local", "Transformer Engine is not installed"),
        (True, True, "te", "Transformer Engine and a GPU are there"),
    ],
)
def test_auto_takes_te_where_it_can_run(monkeypatch, cuda, installed, backend, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(specs.te, "HAVE_TE", installed)
    assert specs.get_backend("auto") == specs.get_backend(backend)
    assert specs.backend_note("auto") == f"backend: auto, which is {backend} ({why})"
    model = recipes.get("vit_l").model
    assert model.backend == "auto" and recipes.get("tiny").model.backend == "local"
    made = specs.transformer_config(model.encoder, model, Split())
    assert made.transformer_impl == {"te": "transformer_engine"}.get(backend, backend)
    assert made.gradient_accumulation_fusion == (backend == "te")


def test_mask_keep_must_be_whole_tokens():
    with pytest.raises(ConfigError, match="not a whole number"):
        dataclasses.replace(small(), mask=MaskConfig(keep=(0.3, 0.1)))
    for share in (0.375, 0.9999, 0.001):  # of 14 x 14 tokens; the message's own numbers are taken
        with pytest.raises(ConfigError, match="keep 0.") as caught:
            MaskConfig(keep=(share, share)).counts(196)
        for typed, count in re.findall(r"(0\.\d+) \((\d+)\)", str(caught.value)):
            assert MaskConfig(keep=(float(typed), 0.5)).counts(196) == (int(count), 98)
