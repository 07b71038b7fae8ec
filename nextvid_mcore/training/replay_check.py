"""Does a recorded pass add the gradients that an eager one adds?

A kernel may compute something else in a CUDA graph than outside of one (cuDNN's attention did, for days, and
no test met it: benchmarks/RESULTS.md). So what has just been recorded is compared with an eager pass of the
same inputs, weights and scales, parameter by parameter. There is no room for a second copy of all gradients;
it happens in their own buffers, which are zero before a step's first micro-batch:

    the eager pass leaves g        whose norms are kept; then the signs are turned: -g, which is exact
    a replay adds its own, h       h - g is what is compared: exactly 0 where both are equal to the bit
    zero, and another replay       the gradient that stays; its norms are compared with those of g

A replay that sets what it should add to leaves h, which is off by 1. What is allowed is for sums whose order
changes from pass to pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

ROUNDING = 0.05  # of a gradient's norm: atomic additions, rounded to FP8, are the most that is right
LEAST = 1e-8  # of its network's norm: a smaller gradient may be rounding alone


@dataclass(frozen=True)
class Differences:
    """How far a recorded pass is off, by parameter, in norms of the gradient that it should add."""

    found: Mapping[str, float]  # infinite where a gradient isn't finite

    @classmethod
    def of(cls, wanted: Mapping[str, float], off: Mapping[str, float]) -> Differences:
        """wanted: norms of the gradients, off: of what they are off by."""
        networks: dict[str, float] = {}
        for name, norm in wanted.items():
            network = _network(name)
            networks[network] = math.hypot(networks.get(network, 0.0), norm)
        found = {}
        for name, norm in wanted.items():
            scale = max(norm, LEAST * networks[_network(name)])
            found[name] = off[name] / scale if scale else math.inf if off[name] else 0.0
        return cls(found)

    @property
    def wrong(self) -> list[str]:
        """The parameters that are off by more than rounding, the worst one first."""
        wrong = [name for name, size in self.found.items() if size > ROUNDING]
        return sorted(wrong, key=lambda name: self.found[name], reverse=True)

    def reason(self) -> str | None:
        """Why the recorded pass can't be used, or None."""
        if not self.wrong:
            return None
        worst = self.wrong[0]
        return (
            f"its gradients are not those of an eager pass: {worst} is off by {self.found[worst]:.1e} of its "
            f"norm, {len(self.wrong)} of {len(self.found)} tensors by more than {ROUNDING}"
        )

    def __str__(self) -> str:
        """The largest of every network, with the parameter where there is one."""
        worst: dict[str, str] = {}
        for name, size in self.found.items():
            network = _network(name)
            if network not in worst or size > self.found[worst[network]]:
                worst[network] = name
        return ", ".join(
            f"{network} {self.found[name]:.1e}" + (f" ({name})" if self.found[name] else "")
            for network, name in worst.items()
        )


class ReplayCheck:
    """The comparison for the parameters of one rank, whose `main_grad` are zero now."""

    def __init__(self, parameters: Iterable[tuple[str, Parameter]]) -> None:
        """parameters: named from their network on (`student.encoder...`); frozen ones are left out."""
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.grads: list[Tensor] = [p.main_grad for _, p in trained]
        self.wanted: list[float] = []
        self.off: list[float] = []

    def eager(self) -> bool:
        """After the eager pass: whether its gradients are finite, or there is nothing to compare with."""
        self.wanted = self._norms()
        return all(map(math.isfinite, self.wanted))

    def turn(self) -> None:
        """Before the first replay: what it adds is compared with what the eager pass left."""
        torch._foreach_neg_(self.grads)

    def replayed(self) -> None:
        """After the first replay; all gradients are zero then, for the second."""
        self.off = self._norms()
        torch._foreach_zero_(self.grads)

    def again(self) -> Differences:
        """After the second replay, whose gradients stay: the larger of the two replays' differences."""
        norms = zip(self._norms(), self.wanted, self.off, strict=True)
        off = [max(off, abs(norm - wanted)) for norm, wanted, off in norms]
        return Differences.of(*(dict(zip(self.names, x, strict=True)) for x in (self.wanted, off)))

    def _norms(self) -> list[float]:
        norms = torch.stack(torch._foreach_norm(self.grads)).tolist()
        return [math.inf if math.isnan(x) else x for x in norms]


def _network(name: str) -> str:
    return name.partition(".")[0]
