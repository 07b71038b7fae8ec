"""Linears whose rows travel beside their products, over four ranks, against one product."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from launch import shared

from nextvid_mcore.config import ModelConfig
from nextvid_mcore.models import overlapped, specs
from nextvid_mcore.parallel import mailbox
from nextvid_mcore.parallel.groups import Layout, build_groups, init_distributed
from nextvid_mcore.recipes import get

RANKS, TOKENS, CLIPS, WIDTH = 4, 12, 1, 16  # three rows a rank: parts of unequal size
WEIGHTS = {"column": (24, WIDTH), "row": (WIDTH, 24)}


def whole(kind: str) -> tuple[torch.Tensor, ...]:
    """Input, weight, bias and the output's gradient, the same everywhere."""
    generator = torch.Generator().manual_seed(3)
    out, into = WEIGHTS[kind]
    shapes = (TOKENS, CLIPS, into), (out, into), (out,), (TOKENS, CLIPS, out)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def on_rank(kind: str, later: bool, overlap: specs.Overlap) -> dict[str, torch.Tensor]:
    init_distributed()
    group = build_groups(Layout(RANKS, sequence=True)).collection.tp
    model: ModelConfig = get("tiny").model
    split = specs.Split(tensor=RANKS, sequence=True, dtype=torch.float64)
    config = specs.transformer_config(model.encoder, model, split)
    backend = specs.get_backend("local", overlap, group)
    out, into = WEIGHTS[kind]
    common = {"config": config, "init_method": None, "bias": True, "skip_bias_add": later, "tp_group": group}
    x, weight, bias, dy = whole(kind)
    r = group.rank()
    if kind == "column":
        linear = backend.column(into, out, gather_output=False, **common)
        x, dy = x.chunk(RANKS)[r], dy.chunk(RANKS, dim=2)[r]
        weight, bias = weight.chunk(RANKS)[r], bias.chunk(RANKS)[r]
    else:
        linear = backend.row(into, out, input_is_parallel=True, is_expert=False, **common)
        x, dy, weight = x.chunk(RANKS, dim=2)[r], dy.chunk(RANKS)[r], weight.chunk(RANKS, dim=1)[r]
    assert mailbox.note(group) == "tensor ranks exchange rows beside products"
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(bias)
    x, box, opened = x.clone().requires_grad_(), mailbox.of(group), []
    inner, box.open = box.open, lambda *args: opened.append(inner(*args))
    with torch.no_grad():
        plain, _ = linear(x)
    assert len(opened) == (overlap == "always")
    with overlapped.beside():
        y, left = linear(x)
    torch.testing.assert_close(y, plain)
    assert (left is linear.bias) == later
    if later:
        y = y + left
    y.backward(dy)
    assert len(opened) == 2 + (overlap == "always")
    return {"y": y.detach(), "x": x.grad, "weight": linear.weight.grad, "bias": linear.bias.grad,
            "waits": torch.tensor(len(box._coming) + len(box._sent))}  # fmt: skip


@pytest.mark.parametrize(("later", "overlap"), [(False, "always"), (True, "always"), (True, "recorded")])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_equals_one_product(kind: str, later: bool, overlap: specs.Overlap) -> None:
    x, weight, bias, dy = (t.requires_grad_() for t in whole(kind))
    y = x @ weight.t() + bias
    y.backward(dy)
    found = shared(RANKS).run(on_rank, kind, later, overlap)
    split = {"column": {"y": 2, "x": 0, "weight": 0, "bias": 0}, "row": {"y": 0, "x": 2, "weight": 1}}[kind]
    got = {name: torch.cat([each[name] for each in found], dim) for name, dim in split.items()}
    if kind == "row":  # each rank has added it to its own rows
        got["bias"] = sum(each["bias"] for each in found)
    for name, want in {"y": y, "x": x.grad, "weight": weight.grad, "bias": bias.grad}.items():
        torch.testing.assert_close(got[name], want)
    assert not any(each["waits"] for each in found)


def frozen_on_rank(frozen: str) -> list[torch.Tensor]:
    """Gradients of two backward passes of a column linear whose weight, or whose input, wants none."""
    init_distributed()
    group = build_groups(Layout(RANKS, sequence=True)).collection.tp
    specs.get_backend("local", "always", group)  # makes the mailbox
    r, found = group.rank(), []
    x, weight, bias, dy = whole("column")
    for scale in (1, 2):
        part, mine = scale * x.chunk(RANKS)[r].flatten(0, 1), weight.chunk(RANKS)[r].clone()
        part.requires_grad_(frozen != "input")
        mine.requires_grad_(frozen != "weight")
        linear = mock.Mock(tp_group=group, config=mock.Mock(gradient_accumulation_fusion=False))
        y = overlapped._Column.apply(part, mine, bias.chunk(RANKS)[r], linear)
        y.backward(scale * dy.chunk(RANKS, dim=2)[r].flatten(0, 1))
        found.append(part.grad if frozen == "weight" else mine.grad)
    return found


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_rows_that_nobody_wants_are_not_waited_for(frozen: str) -> None:
    """An exchange takes its own rows, whatever the one before it had no use for."""
    x, weight, _, dy = (t.flatten(0, 1) if t.dim() == 3 else t for t in whole("column"))
    want = dy @ weight if frozen == "weight" else dy.t() @ x
    first, second = zip(*shared(RANKS).run(frozen_on_rank, frozen), strict=True)
    torch.testing.assert_close(torch.cat(first), want)
    torch.testing.assert_close(torch.cat(second), (2 if frozen == "weight" else 4) * want)
