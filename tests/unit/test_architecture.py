"""docs/architecture.md names files and things in them: they are there."""

from __future__ import annotations

import ast
import re
import typing
from functools import cache
from pathlib import Path

import pytest

from nextvid_mcore.config import TargetConfig
from nextvid_mcore.parallel.plan import TARGETS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nextvid_mcore"
SPANS = re.findall(r"`([^`]+)`", (ROOT / "docs" / "architecture.md").read_text())
FILES = [x for x in SPANS if re.fullmatch(r"[\w/]+(\.py(: .*)?|/)", x)]
PARTS = [x for x in SPANS if re.fullmatch(r"[A-Za-z]\w*\.(?!py$)\w+", x)]  # Class.method, module.function


@cache
def names(path: Path) -> set[str]:
    """What a file defines: functions, classes, their fields, constants."""
    found = set()
    for x in ast.walk(ast.parse(path.read_text())):
        found |= {getattr(x, key) for key in ("name", "id") if isinstance(getattr(x, key, None), str)}
    return found


@pytest.mark.parametrize("span", FILES)
def test_files_and_what_is_in_them(span: str):
    name, _, thing = span.partition(": ")
    places = [path for path in (ROOT / name, PACKAGE / name) if path.exists()]
    path = places[0] if places else next(PACKAGE.rglob(name))  # named behind another of its folder
    for part in re.findall(r"\w+", thing):
        assert part in names(path)


@pytest.mark.parametrize("span", PARTS)
def test_parts(span: str):
    whole, part = span.split(".")
    homes = [path for path in PACKAGE.rglob("*.py") if whole in names(path) | {path.stem}]
    assert any(part in names(path) for path in homes)


def test_every_target_has_a_name_in_the_plan():
    assert list(TARGETS) == list(typing.get_args(typing.get_type_hints(TargetConfig)["kind"]))
