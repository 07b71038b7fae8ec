"""What a setting that cannot work raises."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from types import NoneType
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot work. The message is written for the person who typed it."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_choices(part: Any, name: str = "") -> None:
    """Raise ConfigError if a field of `part`, or of a dataclass in it, is infinite or not in its `Literal`.

    The command line has seen to the latter; a benchmark's, a notebook's or a test's own configuration hasn't.
    """
    for field in dataclasses.fields(part):
        value, where = getattr(part, field.name), f"{name} {field.name}".strip()
        if dataclasses.is_dataclass(value):
            require_choices(value, where)
            continue
        for x in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(x):
                require_choices(x, where)
            finite = not isinstance(x, float) or math.isfinite(x)
            require(finite, f"{where} must be a finite number, got {x}")
        choices = _choices(type(part)).get(field.name)
        require(
            choices is None or value in choices,
            f"{where} {value!r} is not one of {', '.join(x for x in choices or () if x)}",
        )


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """The allowed values of `kind`'s fields that are a Literal, or one or None."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = [hint] if typing.get_origin(hint) is Literal else typing.get_args(hint)
        if any(typing.get_origin(x) is Literal for x in parts):
            values = [(None,) if x is NoneType else typing.get_args(x) for x in parts]
            found[name] = tuple(value for each in values for value in each)
    return found
