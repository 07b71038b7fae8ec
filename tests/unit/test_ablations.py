"""Each ablation changes what it says and nothing else: networks, whole steps, checkpoints and exports."""

from __future__ import annotations

import dataclasses

import parity
import pytest
import torch
from test_models import CHANNELS, T_TOKENS, build, micro_batch, small, video_of, z_of
from tool import tool
from torch import Tensor

from nextvid_mcore import recipes
from nextvid_mcore.config import MaskConfig, RunConfig
from nextvid_mcore.hub import HubError, export
from nextvid_mcore.masking import draw_masks, mean_shares
from nextvid_mcore.models.nextvid import NextVid
from nextvid_mcore.models.sequences import predictor_sequence
from nextvid_mcore.parallel.groups import init_distributed, seed_trackers, sequences
from nextvid_mcore.parallel.placement import resolve_placement
from nextvid_mcore.parallel.seats import build_seats
from nextvid_mcore.recipes.ablations import ablate
from nextvid_mcore.training import checkpoint
from nextvid_mcore.training.evaluate import Table
from nextvid_mcore.training.step import StepResult, TrainStep

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seats():
    init_distributed()
    seats = build_seats(resolve_placement(parity.small(), 1))
    seed_trackers(0, seats.home)
    return seats


@pytest.fixture(scope="module")
def groups(seats):
    return seats.home.collection


def lively(config: RunConfig) -> RunConfig:
    """Large weights everywhere, so that whatever is seen shows."""
    return config.altered(model={"init_std": 0.2}, train={"init_noise": 0.2})


# C-Iso. off --------------------------------------------------------------------------------------


def test_joint_rows_and_stretches_are_separate(groups):
    """packed: every (clip, mask) gives what it gives alone."""
    config = small("packed").altered(model={"context": "joint"})
    model = build(config, groups)
    video = video_of(config, clips=3)
    together = z_of(model, video, draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [4, 5, 6]))
    for i in range(3):
        masks = draw_masks(config.mask, config.model.grid, T_TOKENS - 1, 0, [4 + i])
        alone = z_of(model, video[i : i + 1], masks)[:, :, :, 0]
        torch.testing.assert_close(alone, together[:, :, :, i], atol=1e-5, rtol=1e-5)
    fixed = small().altered(model={"context": "joint"})
    both = draw_masks(fixed.mask, fixed.model.grid, T_TOKENS - 1, 0, [0, 1])
    first = both.segments[0]
    alone = dataclasses.replace(both, tokens=both.of(first), segments=(first,), counts=both.counts[:1])
    model, video = build(fixed, groups), video_of(fixed)
    torch.testing.assert_close(
        z_of(model, video, alone)[:, 0], z_of(model, video, both)[:, 0], atol=1e-6, rtol=1e-5
    )


def changed_by(model: NextVid, masks, place: int) -> Tensor:
    """Which of the predictor's tokens, [s], a change of what enters its layers at `place` reaches."""
    config = model.run.model
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(masks.tokens.shape[1], 1, config.predictor.width, generator=generator)
    sequence = predictor_sequence(config, masks, T_TOKENS, CPU)
    outputs = []

    def nudge(module, args, kwargs):
        hidden = kwargs["hidden_states"].clone()
        hidden[place] += torch.linspace(-1, 2, hidden.shape[-1])  # a constant would vanish in the norms
        return args, kwargs | {"hidden_states": hidden}

    keep = model.predictor.block.register_forward_hook(lambda module, args, out: outputs.append(out))
    model.predictor(context, sequence)
    hook = model.predictor.block.register_forward_pre_hook(nudge, with_kwargs=True)
    model.predictor(context, sequence)
    hook.remove()
    keep.remove()
    return ((outputs[0] - outputs[1]).abs().amax((1, 2)) > 1e-6).nonzero()[:, 0]


def test_who_sees_whom_in_either_predictor(groups):
    """Isolated: a query is alone with the context. Joint: with its frame, and context tokens change."""
    n, p = 64, T_TOKENS - 1
    masks = draw_masks(small().mask, 8, p, 0, [0])
    second = masks.segments[1]

    isolated = build(lively(small()), groups)
    query = (p + 1) * n + 5  # mask 2, frame 2, position 5, among the queries alone
    assert changed_by(isolated, masks, query).tolist() == [query]

    joint = build(lively(small().altered(model={"context": "joint"})), groups)
    first_query = masks.segments[0].length + p * n + second.length  # of mask 2
    query = first_query + n + 5
    assert changed_by(joint, masks, query).tolist() == list(range(first_query + n, first_query + 2 * n))
    v = masks.counts[1]
    context = masks.segments[0].length + p * n + v + 3  # mask 2, frame 1
    start = context - 3
    seen_by = [*range(start, first_query), *range(first_query + n, first_query + p * n)]
    assert changed_by(joint, masks, context).tolist() == seen_by


def test_joint_sequence_is_as_long_as_the_layout_thinks(groups):
    for mode in ("fixed", "none"):
        config = small(mode).altered(model={"context": "joint"})
        masks = draw_masks(config.mask, 8, T_TOKENS - 1, 0, [0])
        frames = T_TOKENS * config.model.tubelet_size
        length = predictor_sequence(config.model, masks, T_TOKENS, CPU).rope.shape[1]
        assert sequences(config, frames)["predictor"] == length
        isolated = config.altered(model={"context": "isolated"})
        queries = predictor_sequence(isolated.model, masks, T_TOKENS, CPU).queries
        assert sequences(isolated, frames)["predictor"] == queries == length - masks.tokens.shape[1]


# Decoder conditioning ----------------------------------------------------------------------------


@torch.no_grad()
def decode(model: NextVid, **change: Tensor) -> Tensor:
    n, rows = model.run.model.tokens_per_frame, 4
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "z": torch.randn(n, rows, model.run.model.predictor.width, generator=generator),
        "noisy": torch.randn(n, rows, CHANNELS, generator=generator),
        "tau": torch.rand(rows, generator=generator),
    }
    for name, place in change.items():
        inputs[name][place] += 0.5 if name != "tau" else 0.1
    return model.decoder(**inputs)


@pytest.mark.parametrize("condition", ["concat", "cross", "cross_self"])
def test_what_a_noisy_token_sees(groups, condition):
    model = build(lively(small().altered(model={"condition": condition})), groups)
    base, n = decode(model), model.run.model.tokens_per_frame

    def changed(**change: tuple) -> Tensor:
        return (decode(model, **change) - base).abs().amax(-1) > 1e-6  # [n, rows]

    frame_only = torch.zeros(n, 4, dtype=torch.bool)
    frame_only[:, 2] = True
    token_only = torch.zeros(n, 4, dtype=torch.bool)
    token_only[7, 2] = True
    assert torch.equal(changed(noisy=(7, 2)), token_only if condition == "cross" else frame_only)
    assert torch.equal(changed(z=(7, 2)), frame_only)
    assert torch.equal(changed(tau=(2,)), frame_only)


@pytest.mark.parametrize("condition", ["cross", "cross_self"])
def test_positions_reach_the_keys(groups, condition):
    """z of another position is another condition: exchanging two of its tokens changes the velocity."""
    model = build(lively(small().altered(model={"condition": condition})), groups)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(64, 1, model.run.model.predictor.width, generator=generator)
    noisy, tau = torch.randn(64, 1, CHANNELS, generator=generator), torch.tensor([0.5])
    order = torch.arange(64)
    order[[3, 40]] = order[[40, 3]]
    assert (model.decoder(z, noisy, tau) - model.decoder(z[order], noisy, tau)).abs().max() > 1e-6


def test_cross_and_cross_self_start_the_same(groups):
    """One attention more or less is all: parameter for parameter the same network."""
    states = [
        build(small().altered(model={"condition": c}), groups).decoder.state_dict()
        for c in ("cross", "cross_self")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0] if torch.is_tensor(states[0][k]))


@pytest.mark.parametrize("condition", ["cross", "cross_self"])
def test_fresh_cross_decoders_start_at_zero(groups, condition):
    config = small().altered(model={"condition": condition}, train=recipes.get("tiny").train)
    model = build(config, groups)
    assert decode(model).abs().max() == 0
    layer = model.decoder.block.layers[1]
    assert layer.adaln.weight.abs().sum() == 0
    assert layer.cross_attention.linear_kv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.cross_attention.linear_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)


# A loss off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["generate", "align"])
@pytest.mark.parametrize("context", ["isolated", "joint"])
def test_a_switch_is_a_loss_of_weight_zero_without_its_networks(groups, switch, context):
    config = small().altered(model={"context": context})
    weightless = {"generate": "flow", "align": "align"}[switch]
    config = config.altered(loss={weightless: 0.0})
    losses, grads = [], []
    for settings in (config, config.altered(model={switch: False})):
        model = build(settings, groups)
        batch = micro_batch(settings, model, video_of(settings), T_TOKENS - 1)
        if settings is not config:  # what the switch makes needless isn't there
            batch = dataclasses.replace(
                batch, **{"generate": {"latents": None}, "align": {"features": None}}[switch]
            )
        terms = model(batch)
        terms.total(settings).backward()
        losses.append(terms.total(settings).detach())
        grads.append({k: x.grad for k, x in model.named_parameters() if x.requires_grad})
    assert torch.equal(*losses)
    gone = grads[0].keys() - grads[1].keys()
    assert grads[1].keys() <= grads[0].keys()
    prefix = {"generate": "decoder.", "align": "predictor.align_head."}[switch]
    assert gone and gone == {k for k in grads[0] if k.startswith(prefix)}
    for name, grad in grads[1].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-6, atol=0, msg=name)


def test_absent_losses_are_absent_from_the_terms(groups):
    for switch, gone in (("generate", {"flow", "tau"}), ("align", {"align", "target", "aligned"})):
        config = small().altered(model={switch: False})
        model = build(config, groups)
        terms = model(micro_batch(config, model, video_of(config), T_TOKENS - 1))
        assert {name for name, value in vars(terms).items() if value is None} == gone
        assert ("decoder" in model.roles()) == hasattr(model, "decoder") == (switch != "generate")
        summary = Table.merged(
            [Table.of([1], terms_of(terms, 1), 4), Table.of([0], terms_of(terms, 0), 4)], 2
        )
        row = summary.summary(config.loss)
        there = "loss_align" if switch == "generate" else "loss_flow"
        assert row["loss"] == pytest.approx(terms.total(config).item(), rel=1e-5)
        nulls = {k for k, v in row.items() if v is None}
        assert (
            nulls
            == {
                "generate": {"loss_flow", "flow_by_tau", "flow_by_frame"},
                "align": {"loss_align", "align_by_frame"},
            }[switch]
        )
        assert row[there] is not None


def terms_of(terms, clip: int):
    """The loss terms of one clip of the micro-batch."""
    losses = ("flow", "tau", "align")
    picked = {k: getattr(terms, k) for k in losses if getattr(terms, k) is not None}
    return dataclasses.replace(terms, **{k: v[clip : clip + 1] for k, v in picked.items()})


# Whole steps -------------------------------------------------------------------------------------


def steps(config: RunConfig, seats, count: int = 2) -> tuple[TrainStep, list[StepResult]]:
    step = TrainStep(config, seats)
    schedule, results = parity.schedule(config), []
    for number in range(count):
        point = schedule.at(number)
        results.append(step.run(point, parity.clips(config, point, 0, 1)))
    return step, results


@pytest.mark.parametrize(
    "row", ["table2_gen", "table2_align", "table2_align_ciso", "table4_no_mask", "table5_cross"]
)
def test_a_row_trains_and_shows_its_losses(seats, row, monkeypatch):
    config = ablate(parity.small(), row)
    if not config.model.align:  # the reference is never run

        def forbidden(*args, **kwargs):
            raise AssertionError("the reference was run")

        monkeypatch.setattr(NextVid, "reference_features", forbidden)
    if not config.model.generate:  # nothing asks for a target: this one's files don't exist
        config = config.altered(target={"kind": "va_vae"})
    step, results = steps(config, seats)
    roles = {"student", "predictor"} | ({"decoder"} if config.model.generate else set())
    assert step.roles.keys() == step.optimizers.optimizers.keys() == roles
    assert (step.target is None) == (not config.model.generate)
    for result in results:
        assert result.applied and result.grad_norm > 0
        assert (result.loss_flow is None) == (not config.model.generate)
        assert (result.loss_align is None) == (not config.model.align)
        assert result.loss == pytest.approx(0.5 * (result.loss_flow or 0) + (result.loss_align or 0))
        assert result.monitors.keys() == (
            {"z_var", "reference_var", "align_cos"} if config.model.align else {"z_var"}
        )
    # the reference is still the EMA: between the start and the weights
    start = build(config, seats.home.collection)
    name = "block.layers.0.mlp.linear_fc1.weight"
    first, now, ema = (
        m.state_dict()[name]
        for m in (start.student.encoder, step.model.student.encoder, step.model.reference)
    )
    moved = (now - first).norm()
    assert moved > 0 and 0 < (ema - first).norm() < 0.1 * moved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ema_off_is_the_student_itself(seats, precision):
    config = ablate(parity.small(), "table12_no_ema")
    config = config.altered(train={"precision": precision})
    step, results = steps(config, seats)
    student, reference = step.model.student.encoder.state_dict(), step.model.reference.state_dict()
    for name, tensor in reference.items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, student[name]), name
    assert all(p.grad is None and not p.requires_grad for p in step.model.reference.parameters())
    if precision == "fp32":  # the first step is the full model's, later ones compare with another reference
        _, full = steps(ablate(parity.small(), "table12_ema"), seats)
        assert results[0].loss_align == full[0].loss_align and results[0].grad_norm == full[0].grad_norm
        assert results[1].loss_align != full[1].loss_align


# No masking --------------------------------------------------------------------------------------


def test_mask_none_is_one_mask_that_hides_nothing(groups):
    mask = MaskConfig(mode="none")
    masks = draw_masks(mask, 8, 3, 0, [4, 9])
    assert (mask.masks, mask.counts(64), masks.counts, mean_shares(mask, 8)) == (1, (64,), (64,), (1.0,))
    assert torch.equal(masks.tokens, torch.arange(192).expand(2, -1))
    assert [(s.mask, s.clips, s.length) for s in masks.segments] == [(0, slice(0, 2), 192)]
    config = small("none")
    model = build(config, groups)
    terms = model(micro_batch(config, model, video_of(config), T_TOKENS - 1))
    assert terms.align.shape == (2, 1, T_TOKENS - 1) and terms.flow.shape == (2, 1, T_TOKENS - 1, 2)


# Checkpoint and export ---------------------------------------------------------------------------


def convert(*args: object) -> int:
    return tool("convert_to_torch").main([str(arg) for arg in args])


@pytest.mark.parametrize("row", ["table2_gen", "table2_align_ciso", "table5_cross_self", "table4_no_mask"])
def test_an_ablations_encoder_is_exported_and_the_rest_refused(seats, row, tmp_path, capsys):
    config = ablate(parity.small(), row)
    step, _ = steps(config, seats, 1)
    saved = checkpoint.save(tmp_path / "checkpoints", 1, 4, config, step.optimizers)
    again = TrainStep(config, seats)
    before = again.model.student.state_dict()["context_projection.weight"].clone()
    assert checkpoint.load(saved, config, again.optimizers).step == 1
    for role, module in step.model.roles().items():
        loaded = again.model.roles()[role].state_dict()
        for name, tensor in module.state_dict().items():
            assert not torch.is_tensor(tensor) or torch.equal(tensor, loaded[name]), name
    assert not torch.equal(before, again.model.student.state_dict()["context_projection.weight"])

    capsys.readouterr()
    assert convert(saved, "--out", tmp_path / "all", "--all") == 2
    assert "exported of the full model only; this run has model." in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    assert convert(saved, "--out", tmp_path / "encoder") == 0
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]


def test_the_full_model_may_be_exported():
    export.check_generator(recipes.get("vit_l").model)
    with pytest.raises(HubError, match="model.align False, model.context joint"):
        export.check_generator(recipes.get("table2_gen").model)
