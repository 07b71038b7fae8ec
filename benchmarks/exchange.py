"""Whether rows that travel beside the products arrive whole, every time: thousands of exchanges.

    torchrun --nproc-per-node 2 benchmarks/exchange.py vit_g --clips 16 --seconds 60

What benchmarks/repeat.py is for kernels. The encoder's linears (models/overlapped.py) play on the same inputs
again and again, forward with the reference's tokens, forward and backward with the student's; eagerly, and
recorded and played again. Before every exchange the memory that rows come to is painted with NaN, and before
every linear the memory that its results get. In half of the plays streams are late at random, on every rank
in its own way: before rows travel, between rows and their signal, before they are taken and before they are
read. Each result is compared with the first to the bit, and the first with the exchange in line. At last, for
a tenth of the time, rows are read before their signal has come, which must be found. Ends with 1 if a result
differed, or if then none did.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import common  # noqa: F401  (puts the clone on the path)
import replay
import torch
import torch.distributed as dist
import world
from arguments import least
from torch import Tensor

from nextvid_mcore import recipes
from nextvid_mcore.config import ModelConfig, RunConfig
from nextvid_mcore.models import overlapped, specs
from nextvid_mcore.parallel import mailbox, reach
from nextvid_mcore.parallel.groups import Layout, build_groups, sequences
from nextvid_mcore.training.graphs import own_stream

WAYS = ("eager", "eager, late", "recorded", "recorded, late")
AT_ONCE = 10  # rounds between two looks at the clock
GRAPHS = 3  # recordings, each late in its own places
LATE = 0.25  # share of the places
APART = 0.25  # of a result's root mean square: rounding stays far below, rows of another pass come far above
GIVE_UP = 60.0  # seconds over what was asked for, after which ranks wait for each other for ever


class Shaken:
    """A mailbox of painted memory and late streams."""

    def __init__(self, inner: mailbox.Mailbox, early: bool) -> None:
        self.inner, self.group, self.early = inner, inner.group, early
        self.rank, self.size, self.others = inner.rank, inner.size, inner.others
        self.side = getattr(inner, "_stream", None)  # where copies are made
        self.random, self.late, self.exchanges = random.Random(inner.rank), 0.0, 0

    def nap(self, stream: Any = None) -> None:
        """5 us to 0.6 ms, on the device `stream`'s or the current one's."""
        if self.random.random() >= self.late:
            return
        seconds = 10 ** self.random.uniform(-5.3, -3.2)
        if self.side is None:
            time.sleep(seconds)
            return
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # else no recording knows it yet
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * 1.8e9))  # cycles

    def open(self, shapes: Sequence[torch.Size], like: Tensor) -> None:
        self.exchanges += 1
        if self.side is not None:  # a CPU's receives are painted by torch (`painted`)
            self.inner._all[-1][0].fill_(255)  # bytes: NaN in every dtype
        self.nap()
        self.inner.open(shapes, like)

    def push(self, slot: int, to: int, parts: Iterable[Tensor]) -> None:
        def slowly() -> Iterator[Tensor]:
            for part in parts:
                self.nap(self.side)
                yield part
            self.nap(self.side)

        self.inner.push(slot, to, slowly())

    def take(self, slot: int, source: int) -> Tensor:
        self.nap()
        early = self._space(slot, source).clone() if self.early else None
        rows = self.inner.take(slot, source)
        self.nap()
        return rows if early is None else early

    def _space(self, slot: int, source: int) -> Tensor:
        """Where rows come to, whether they are there or not."""
        if self.side is None:
            return self.inner._coming[slot, source][1]
        return self.inner._space(slot, source, self.rank)

    def close(self) -> None:
        self.inner.close()


@dataclass
class Case:
    """A linear of the encoder, and what it gets on this rank."""

    name: str
    linear: Any
    seen: Tensor  # by the reference
    x: Tensor  # by the student
    dy: Tensor

    def play(self) -> dict[str, Tensor]:
        with torch.no_grad():
            seen = self.linear(self.seen)[0]
        y, later = self.linear(self.x)
        weight, wanted = self.linear.weight, [self.x, self.linear.weight]
        if later is None:
            wanted.append(self.linear.bias)
        if hasattr(weight, "main_grad"):
            weight.main_grad.zero_()
        dx, dw, *db = torch.autograd.grad(y, wanted, self.dy, allow_unused=True)
        found = {"reference": seen, "y": y.detach(), "dx": dx, "dw": getattr(weight, "main_grad", dw)}
        return {f"{self.name} {what}": x for what, x in (found | dict(zip(["db"], db, strict=False))).items()}


def cases(config: RunConfig, clips: int, group: dist.ProcessGroup, device: torch.device) -> list[Case]:
    """The four linears of a block."""
    model: ModelConfig = config.model
    shape, size = model.encoder, group.size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    split = specs.Split(tensor=size, sequence=True, dtype=dtype)
    settings = specs.transformer_config(shape, model, split)
    mailbox.usable(group, must=True)
    backend = specs.get_backend(model.backend, "recorded", group)
    generator = torch.Generator(device).manual_seed(1 + group.rank())
    tokens = sequences(config, config.stages[0].frames)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def case(name: str, into: int, out: int, column: bool) -> Case:
        kind = {"gather_output": False} if column else {"input_is_parallel": True}
        kind |= {"config": settings, "init_method": lambda weight: None, "bias": True}
        kind |= {"skip_bias_add": name != "qkv", "is_expert": False}
        kind |= {"tp_comm_buffer_name": name, "tp_group": group}
        linear = (backend.column if column else backend.row)(into, out, **kind).to(device)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(0.02 * noise(*parameter.shape))
        if settings.gradient_accumulation_fusion:
            linear.weight.main_grad = torch.zeros_like(linear.weight, dtype=torch.float32)
            linear.weight.grad_added_to_main_grad = False
        whole, parts = ((out // size, into), (size, 1)) if column else ((out, into // size), (1, size))
        seen, s = tokens["reference"], tokens["student"]
        x = noise(s // parts[0], clips, whole[1]).requires_grad_()
        dy = noise(s // parts[1], clips, whole[0])
        return Case(name, linear, noise(seen // parts[0], clips, whole[1]), x, dy)

    width, mlp = shape.width, shape.mlp
    return [
        case("qkv", width, 3 * width, True),
        case("proj", width, width, False),
        case("fc1", width, mlp, True),
        case("fc2", mlp, width, False),
    ]


@contextlib.contextmanager
def painted() -> Iterator[None]:
    """On a CPU torch fills what it allocates with NaN; on a GPU `paint` does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or not torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def paint(like: Iterable[Tensor]) -> None:
    """NaN in the memory that the next tensors of these sizes get."""
    memory = [torch.full_like(x, float("nan")) for x in like for _ in range(2)]
    del memory


class Comparison:
    """Rounds of all cases, each result compared with the first."""

    def __init__(self, found: list[Case], first: dict[str, Tensor]) -> None:
        self.cases, self.first = found, first
        self.odd = {name: torch.empty_like(x) for name, x in first.items()}  # the first that differed
        device = next(iter(first.values())).device
        self.broken, self.other = (
            {name: torch.zeros((), dtype=torch.int64, device=device) for name in first} for _ in range(2)
        )

    @overlapped.beside()
    def round(self) -> None:
        for case in self.cases:
            paint(x for name, x in self.first.items() if name.startswith(f"{case.name} "))
            for name, x in case.play().items():
                differs = (x != self.first[name]).any()
                self.odd[name].copy_(torch.where(differs & (self.other[name] == 0), x, self.odd[name]))
                self.broken[name] += ~torch.isfinite(x).all()
                self.other[name] += differs

    def taken(self) -> tuple[int, int, str]:
        """Results that were not finite, that differed, and where the first lay; from here on none has."""
        broken, other = ({k: int(n) for k, n in x.items()} for x in (self.broken, self.other))
        where = ""
        for name in (name for name, n in other.items() if n):
            at = (self.odd[name] != self.first[name]).nonzero()
            off = apart(self.first[name], self.odd[name])
            where += f" {name} at {at[0].tolist()} to {at[-1].tolist()} ({len(at)} values, off {off:.1e})"
        for counter in (*self.broken.values(), *self.other.values()):
            counter.zero_()
        return sum(broken.values()), sum(other.values()), where


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference over the root mean square of `a`; infinite where something is not finite."""
    a, b = a.float(), b.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).abs().max() / a.square().mean().sqrt())


def in_turn(works: list[Callable[[], None]], seconds: float, rounds: int) -> int:
    """Call them by turns, as often on every rank, for some seconds or `rounds` rounds; how often."""
    done, begun = 0, time.perf_counter()
    while done < rounds:
        for _ in range(min(AT_ONCE, rounds - done)):
            works[done % len(works)]()
            done += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = [time.perf_counter() - begun > seconds]
        dist.broadcast_object_list(spent)  # rank 0's clock
        if spent[0]:
            break
    return done


def played(
    config: RunConfig, clips: int, group: dist.ProcessGroup, seconds: float, rounds: int, early: bool
) -> tuple[int, int]:
    """How many results differed, and exchanges, over all ways; a line on each from rank 0.

    Raises:
        RuntimeError: the first results are not those of the exchange in line.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    found = cases(config, clips, group, device)
    inner = mailbox.of(group)
    say = print if group.rank() == 0 else lambda *_, **__: None
    with contextlib.ExitStack() as stack:
        stack.enter_context(painted())
        first, worst = {}, 0.0
        for case in found:
            plain = {name: x.clone() for name, x in case.play().items()}
            with overlapped.beside():
                mine = {name: x.clone() for name, x in case.play().items()}
            off = {name: apart(plain[name], x) for name, x in mine.items()}
            worst = max(worst, *off.values())
            say(f"off the exchange in line: {', '.join(f'{name} {x:.1e}' for name, x in off.items())}")
            first |= mine
        bad = max(reach.gathered(group, worst))
        if not bad < APART:
            raise RuntimeError(f"results are {bad:.2g} of their root mean square off those in line")
        box = Shaken(inner, early)
        mailbox._found[group.group_name] = group, box
        stack.callback(lambda: mailbox._found.__setitem__(group.group_name, (group, inner)))
        comparison, differed, exchanges = Comparison(found, first), 0, 0
        say(f"{'':<16}{'rounds':>8}{'exchanges':>11}{'not finite':>12}{'different':>11}", flush=True)
        for way in WAYS if cuda else WAYS[:2]:
            box.late, graphs = LATE if "late" in way else 0.0, []
            box.random = random.Random(f"{way} {box.rank}")
            works, each = [comparison.round], None
            if way.startswith("recorded"):
                for _ in range(GRAPHS if box.late else 1):
                    before = box.exchanges
                    graphs.append(replay.recorded(comparison.round))
                    each = (box.exchanges - before) // (replay.WARM + 1)

                def shaken(graph: torch.cuda.CUDAGraph) -> None:
                    box.nap()
                    graph.replay()

                works = [lambda graph=graph: shaken(graph) for graph in graphs]
            comparison.taken()
            before = box.exchanges
            done = in_turn(works, seconds / len(WAYS), rounds)
            many = box.exchanges - before if each is None else each * done
            every = reach.gathered(group, comparison.taken())
            broken, other = (sum(x[i] for x in every) for i in (0, 1))
            say(f"{way:<16}{done:>8}{many:>11}{broken:>12}{other:>11}", flush=True)
            for rank, (_, n, where) in enumerate(every):
                if n:
                    say(f"  rank {rank}:{where[:300]}", flush=True)
            differed, exchanges = differed + other, exchanges + many
            for graph in graphs:
                graph.reset()
    return differed, exchanges


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="vit_g", choices=recipes.names())
    parser.add_argument("--clips", type=least(1), default=16, help="of a micro-batch")
    parser.add_argument("--seconds", type=least(0, float), default=60, help="of all ways together")
    parser.add_argument("--rounds", type=least(1), default=10**9, help="of each way at most")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error("start 2 ranks or more with torchrun --nproc-per-node")
    world.join(0)
    if torch.cuda.is_available():
        own_stream()
    faulthandler.dump_traceback_later(args.seconds + GIVE_UP, exit=True)
    config = recipes.get(args.recipe)
    group = build_groups(Layout(dist.get_world_size(), sequence=True)).collection.tp
    differed, exchanges = played(config, args.clips, group, args.seconds, args.rounds, early=False)
    if group.rank() == 0:
        print("read before their signal:", flush=True)
    found, tries = played(config, args.clips, group, args.seconds / 10, args.rounds, early=True)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if group.rank() == 0:
        print(f"{where}; {differed} results differed in {exchanges} exchanges, read early {found} in {tries}")
    mailbox._found.clear()
    world.leave()
    faulthandler.cancel_dump_traceback_later()
    return int(differed > 0 or found == 0)


if __name__ == "__main__":
    sys.exit(main())
