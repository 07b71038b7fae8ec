"""What `--parallel.tensor-overlap` means for a layout, and which GPUs can do it."""

from __future__ import annotations

from unittest import mock

import pytest

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
        (TWO, 2, "never"),
        (f"{TWO} {AUTO}", 2, "recorded"),
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
        (("a", "gpu-1"), True, None),
        (("a", "gpu-1"), False, "GPUs 0 and 1 have no NVLink"),
        (("b", "gpu-1"), True, "its ranks sit on a and b"),
        (("a", "gpu-7"), True, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_cannot_reach_each_other_are_named(
    other: tuple[str, str], linked: bool, said: str | None
) -> None:
    with (
        mock.patch.object(reach.torch.cuda, "device_count", lambda: 2),
        mock.patch.object(reach, "_uuid", lambda device: f"gpu-{device}"),
        mock.patch.object(reach, "_atomic", lambda a, b: linked),
    ):
        found = reach._unreachable(0, ("a", "gpu-0"), other)
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


@pytest.mark.parametrize("failed", [0, 1])
def test_memory_that_cannot_be_mapped_leaves_the_exchange_in_line(failed: int) -> None:
    """On every rank, whichever failed."""
    group = mock.Mock(group_name="unmapped")
    reasons = [None, None]
    reasons[failed] = "tensor ranks can't map 1048576 bytes of each other's memory (EPERM)"

    def made(group: object) -> mailbox.CopiedMailbox:
        if failed == 0:
            raise ConfigError(f"{reasons[0]}\nand where it was raised")
        return mock.Mock()

    with (
        mock.patch.dict(mailbox._found),
        mock.patch.object(mailbox.dist, "get_backend", lambda group: "nccl"),
        mock.patch.object(reach, "reason", lambda group: None),
        mock.patch.object(mailbox, "CopiedMailbox", made),
        mock.patch.object(reach, "gathered", lambda group, mine: [mine, reasons[1]]),
    ):
        assert specs.get_backend("local", "recorded", group) == specs.get_backend("local")
        assert mailbox.note(group).endswith(f"in line: {reasons[failed]}")
