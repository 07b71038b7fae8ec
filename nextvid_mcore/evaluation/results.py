"""What a probe reports: counts, accuracy with its interval, and a JSON file written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from nextvid_mcore.config import ConfigError, require

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
Z95 = 1.959963984540054  # of the normal distribution, two-sided 95%


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share: it stays in [0, 1] and holds for shares near the ends."""
    if total == 0:
        return 0.0, 1.0
    share, square = correct / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half


def score(correct: int, total: int, unreadable: int, classes: int) -> dict[str, Any]:
    """A validation result, accuracies in percent. An item that couldn't be read counts as wrong."""
    low, high = wilson(correct, total)
    return {
        "top1": 100 * correct / max(1, total),
        "ci95": [100 * low, 100 * high],
        "correct": correct,
        "items": total,
        "unreadable": unreadable,
        "classes": classes,
        "chance": 100 / classes,
    }


def writable_folder(path: Path, flag: str = "--out") -> Path:
    """`path`, made where it isn't there. ConfigError, before any work, where nothing can be written in it."""
    require(
        path.suffix.lower() not in PICTURES or path.exists(),
        f"{flag} {path} is a picture's name, and several files are written; name a folder",
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be written ({error.strerror}); name another folder"
        ) from None
    return path


def picture_file(path: Path, flag: str = "--out") -> Path:
    """`path`, if a picture can be written there; ConfigError before any work otherwise."""
    require(
        path.suffix.lower() in PICTURES and not path.is_dir(),
        f"{flag} {path} is no picture's name; end it in one of {', '.join(PICTURES)}",
    )
    writable_folder(path.parent, flag)
    return path


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
