"""Write a short video without an encoder library: motion JPEG (by PIL) in an AVI file (RIFF chunks).

decord only reads. The demo data set and the tests need to write, and this saves them a dependency of
tens of megabytes. Every frame is a key frame, so such files also seek fast. Source: Microsoft's AVI
RIFF reference (avih, strh, strf, movi, idx1).
"""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

KEY_FRAME = 0x10
HAS_INDEX = 0x10


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _list(name: bytes, *chunks: bytes) -> bytes:
    return _chunk(b"LIST", name + b"".join(chunks))


def write_avi(path: str | Path, frames: np.ndarray, fps: float, quality: int = 90) -> None:
    """frames: uint8 [T, height, width, 3]"""
    count, height, width, _ = frames.shape
    rate = Fraction(fps).limit_denominator(1001)
    chunks, index, offset = [], [], 4
    for frame in frames:
        jpeg = io.BytesIO()
        Image.fromarray(frame).save(jpeg, "JPEG", quality=quality)
        chunks.append(_chunk(b"00dc", jpeg.getvalue()))
        index.append(b"00dc" + struct.pack("<III", KEY_FRAME, offset, len(jpeg.getvalue())))
        offset += len(chunks[-1])
    largest = max(map(len, chunks))
    main = (round(1e6 / fps), largest * round(fps + 1), 0, HAS_INDEX, count, 0, 1, largest, width, height)
    stream = (
        b"vids",
        b"MJPG",
        0,
        0,
        0,
        0,
        rate.denominator,
        rate.numerator,
        0,
        count,
        largest,
        0xFFFFFFFF,
        0,
    )
    bitmap = (40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    header = _list(
        b"hdrl",
        _chunk(b"avih", struct.pack("<14I", *main, 0, 0, 0, 0)),
        _list(
            b"strl",
            _chunk(b"strh", struct.pack("<4s4sIHHIIIIIIII4H", *stream, 0, 0, width, height)),
            _chunk(b"strf", struct.pack("<IiiHH4sIiiII", *bitmap)),
        ),
    )
    body = b"AVI " + header + _list(b"movi", *chunks) + _chunk(b"idx1", b"".join(index))
    Path(path).write_bytes(_chunk(b"RIFF", body))
