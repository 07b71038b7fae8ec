"""What a setting that cannot work raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work. The message is written for the person who typed it."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
