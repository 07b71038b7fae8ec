"""What `--parallel.tensor-overlap` means for a layout, and which GPUs can do it."""

from __future__ import annotations

import functools
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch

from nextvid_mcore import cli
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.models import specs
from nextvid_mcore.parallel import mailbox, reach, split
from nextvid_mcore.parallel.placement import resolve_placement

TWO = "--parallel.encoder.tensor 2 --parallel.sequence"
AUTO = "--parallel.tensor-overlap auto"


def made(line: str) -> RunConfig:
    return cli.parse(["vit_l", "--dry-run", "--world-size", "8", *line.split()])[0]


@pytest.mark.parametrize(
    ("line", "world", "wanted"),
    [
        (TWO, 2, "recorded"),  # the default
        (f"{TWO} {AUTO}", 2, "recorded"),
        (f"{TWO} --parallel.tensor-overlap off", 2, "never"),
        (f"{TWO} --parallel.tensor-overlap on --train.cuda-graphs off", 2, "always"),
        (f"{AUTO} --parallel.encoder.tensor 2", 2, "never"),  # no sequence parallelism
        (f"{TWO} {AUTO} --train.cuda-graphs off", 2, "never"),
        (f"{TWO} {AUTO} --train.precision fp32", 2, "never"),
        (f"{TWO} {AUTO} --fp8.reference current", 2, "never"),
        (f"{TWO} {AUTO} --parallel.encoder.pipeline 2", 4, "never"),
        (f"{AUTO} --parallel.encoder.tensor 4 --parallel.sequence", 4, "never"),  # no GPUs have shown it
    ],
)
def test_auto_is_what_was_seen_to_pay(line: str, world: int, wanted: str) -> None:
    config = made(f"--model.backend te {line}")
    placement = resolve_placement(config, world)
    assert split.overlap(config, placement, placement.encoder.layout) == wanted


def test_without_transformer_engine_rows_are_exchanged_in_line() -> None:
    config = made(f"--model.backend local {TWO} {AUTO}")
    placement = resolve_placement(config, 2)
    assert split.overlap(config, placement, placement.encoder.layout) == "never"


def test_fp8_and_on_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="tensor-overlap on cuts products of bf16"):
        made(f"--model.backend te {TWO} --parallel.tensor-overlap on --fp8.all current")


@pytest.mark.parametrize(
    ("other", "linked", "said"),
    [
        (("a", "gpu-1", ("pid:[1]", 5, 7)), True, None),
        (("a", "gpu-1", ("pid:[1]", 5, 7)), False, "GPUs 0 and 1 have no NVLink"),
        (("b", "gpu-1", ("pid:[1]", 5, 7)), True, "its ranks sit on a and b"),
        (("a", "gpu-7", ("pid:[1]", 5, 7)), True, "CUDA_VISIBLE_DEVICES"),
        (("a", "gpu-1", ("pid:[2]", 5, 7)), True, "in containers of their own or with another TMPDIR"),
        (("a", "gpu-1", ("pid:[1]", 5, 8)), True, "in containers of their own or with another TMPDIR"),
    ],
)
def test_gpus_that_cannot_reach_each_other_are_named(
    other: reach.Place, linked: bool, said: str | None
) -> None:
    with (
        mock.patch.object(reach.torch.cuda, "device_count", lambda: 2),
        mock.patch.object(reach, "_uuid", lambda device: f"gpu-{device}"),
        mock.patch.object(reach, "_atomic", lambda a, b: linked),
    ):
        found = reach._unreachable(0, ("a", "gpu-0", ("pid:[1]", 5, 7)), other)
    assert found is None if said is None else said in found


def test_gpus_without_a_link_exchange_in_line_unless_they_must_not() -> None:
    group = mock.Mock(group_name="apart")
    with (
        mock.patch.dict(mailbox._found),
        mock.patch.object(mailbox.dist, "get_backend", lambda group: "nccl"),
        mock.patch.object(reach, "reason", lambda group: "GPUs 0 and 1 have no NVLink between them"),
    ):
        assert mailbox.note(group) is None
        assert specs.get_backend("local", "recorded", group) == specs.get_backend("local")
        assert mailbox.note(group).endswith("in line: GPUs 0 and 1 have no NVLink between them")
        with pytest.raises(
            ConfigError, match="no NVLink between them; use --parallel.tensor-overlap auto or off"
        ):
            specs.get_backend("local", "always", group)


def test_processes_of_one_host_share_their_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    here = reach._surroundings()
    assert reach._surroundings() == here
    for another in ("/", "/nowhere"):
        monkeypatch.setenv("TMPDIR", another)
        assert reach._surroundings() != here
    monkeypatch.setattr(reach.os, "readlink", mock.Mock(side_effect=FileNotFoundError(2, "no such file")))
    assert reach._surroundings() == (None,)


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("step", ["empty_strided_p2p", "rendezvous"])
def test_memory_that_cannot_be_mapped_leaves_the_exchange_in_line(step: str, failed: int) -> None:
    """On every rank, whichever failed; and nobody waits in the rendezvous for one that has no memory."""
    store = mock.Mock(timeout=600)
    group = mock.Mock(group_name="unmapped", rank=lambda: 0, size=lambda: 2, get_group_store=lambda: store)
    asked: list[str] = []

    def called(name: str, *args: object) -> mock.Mock:
        asked.append(name)
        if failed == 0 and step == name:
            raise RuntimeError("EPERM\nand where it was raised")
        if failed == 1 and step == name == "rendezvous":
            raise torch.distributed.DistStoreError("wait timeout after 60000ms")
        return mock.Mock()

    def gathered(group: object, mine: object) -> list[object]:
        return [mine, "EPERM" if failed == 1 and asked[-1] == step else None]

    steps = "empty_strided_p2p", "rendezvous"
    memory = mock.Mock(**{name: functools.partial(called, name) for name in steps})
    cuda = {"Stream": mock.Mock(), "current_device": lambda: 0, "is_current_stream_capturing": lambda: False}
    with (
        mock.patch.dict(mailbox._found),
        mock.patch.object(mailbox.dist, "get_backend", lambda group: "nccl"),
        mock.patch.object(reach, "reason", lambda group: None),
        mock.patch.object(reach, "gathered", gathered),
        mock.patch.object(torch._C._distributed_c10d, "_SymmetricMemory", memory),
        mock.patch.multiple(torch.cuda, **cuda),
    ):
        assert specs.get_backend("local", "recorded", group) == specs.get_backend("local")
        said = mailbox.note(group)
    assert asked == list(steps[: 1 + steps.index(step)])
    assert said.endswith("in line: tensor ranks can't map 1048576 bytes of each other's memory (EPERM)")
    if step == "rendezvous":
        assert [call.args[0] for call in store.set_timeout.call_args_list] == [timedelta(seconds=60), 600]
