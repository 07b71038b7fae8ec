"""Numbers on a benchmark's command line: refused with one sentence where they can't be."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def least(value: int, kind: type = int) -> Callable[[str], float]:
    """For argparse's `type`: a number (`kind`) of at least `value`, of floats more than it."""

    def number(text: str) -> float:
        found = kind(text)
        if found < value or (kind is float and found == value):
            raise argparse.ArgumentTypeError(
                f"{text} is too small; give {'more than ' * (kind is float)}{value}"
                f"{' or more' * (kind is int)}"
            )
        return found

    number.__name__ = kind.__name__  # argparse: invalid int value
    return number
