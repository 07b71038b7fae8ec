"""Gradients of a replay against those of an eager pass, in their own buffers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from nextvid_mcore.training.replay_check import LEAST, ROUNDING, Differences, ReplayCheck

SIZES = {"student.encoder.weight": (7, 5), "student.encoder.bias": (7,), "decoder.out": (3, 5)}


def parameters() -> list[tuple[str, Parameter]]:
    named = [(name, Parameter(torch.zeros(*size))) for name, size in SIZES.items()]
    named.append(("reference.weight", Parameter(torch.zeros(2), requires_grad=False)))
    for _, p in named[:-1]:
        p.main_grad = torch.zeros_like(p)
    return named


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*size, generator=generator) for name, size in SIZES.items()}


def compared(
    *replays: Callable[[str, torch.Tensor], torch.Tensor],
) -> tuple[Differences, dict[str, torch.Tensor]]:
    """Of an eager pass that adds `gradients` and two replays that add what is made of them; what is left."""
    named = parameters()
    check = ReplayCheck(named)

    def add(made: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        for name, p in named[:-1]:
            p.main_grad += made(name, gradients()[name])

    add(lambda name, g: g)
    assert check.eager()
    check.turn()
    add(replays[0])
    check.replayed()
    add(replays[1])
    return check.again(), {name: p.main_grad for name, p in named[:-1]}


def right(name: str, g: torch.Tensor) -> torch.Tensor:
    return g


def test_equal_gradients_differ_by_nothing_and_stay() -> None:
    found, left = compared(right, right)
    assert dict(found.found) == dict.fromkeys(SIZES, 0.0)
    assert found.reason() is None and str(found) == "student 0.0e+00, decoder 0.0e+00"
    assert all(torch.equal(left[name], g) for name, g in gradients().items())


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("size", "accepted"), [(0.9 * ROUNDING, True), (1.1 * ROUNDING, False), (-1.0, False), (math.nan, False)]
)
def test_one_tensor_that_is_off(size: float, accepted: bool, which: int) -> None:
    def off(name: str, g: torch.Tensor) -> torch.Tensor:
        return g * (1 + size) if name == "decoder.out" else g

    replays = [right, right]
    replays[which] = off
    found, _ = compared(*replays)
    wanted = math.inf if math.isnan(size) else abs(size)
    assert found.found["decoder.out"] == pytest.approx(wanted, rel=1e-5)
    assert str(found) == f"student 0.0e+00, decoder {wanted:.1e} (decoder.out)"
    assert (found.reason() is None) == accepted
    assert accepted or f"decoder.out is off by {wanted:.1e} of its norm, 1 of 3 tensors" in found.reason()


def test_what_is_shifted_and_keeps_its_norm_is_found_in_the_first_replay() -> None:
    found, _ = compared(lambda name, g: g.flip(0), right)
    assert found.wrong and min(found.found.values()) > ROUNDING


def test_a_pass_that_is_not_finite_has_nothing_to_compare() -> None:
    for value in (math.nan, math.inf):
        named = parameters()
        check = ReplayCheck(named)
        named[1][1].main_grad[2] = value
        assert not check.eager()


def test_gradients_far_below_their_networks_are_rounding() -> None:
    wanted = {"student.a": 1.0, "student.b": LEAST / 100, "decoder.c": 0.0}
    assert (
        Differences.of(wanted, {"student.a": 0.0, "student.b": LEAST / 100, "decoder.c": 0.0}).reason()
        is None
    )
    assert Differences.of(wanted, {"student.a": 0.0, "student.b": LEAST, "decoder.c": 0.0}).wrong == [
        "student.b"
    ]
    assert Differences.of(wanted, {"student.a": 0.0, "student.b": 0.0, "decoder.c": 1e-9}).wrong == [
        "decoder.c"
    ]
