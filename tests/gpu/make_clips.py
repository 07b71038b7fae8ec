"""Wrote the files in clips/, with PyAV 19: `python tests/gpu/make_clips.py`. A GPU host has no encoder.

40 frames at 25 a second, 192 x 160. The right third of frame t is grey of level 5 t + 30 (`number`);
the rest is a smooth coloured pattern that moves. Key frames every 12 frames, with B frames.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLIPS = Path(__file__).parent / "clips"
FRAMES, HEIGHT, WIDTH = 40, 160, 192
FILES = (  # name, encoder, pixel format, its options
    ("h264.mp4", "libx264", "yuv420p", {"crf": "16", "bf": "2", "g": "12"}),
    ("hevc.mp4", "libx265", "yuv420p", {"crf": "16", "x265-params": "keyint=12:bframes=2:log-level=0"}),
    ("h264-444.mp4", "libx264", "yuv444p", {"crf": "16"}),  # NVDEC has h264 with 4:2:0 alone
)


def picture(t: int) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]"""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 40
    waves = (np.sin(x + t / 10), np.cos(y - t / 10), np.sin(x + y))
    frame = (128 + 70 * np.stack(waves, -1)).astype(np.uint8)
    frame[:, 2 * WIDTH // 3 :] = 5 * t + 30
    return frame


def number(frames: np.ndarray) -> list[int]:
    """t of each of `frames` [T, height, width, 3], decoded and not cropped."""
    levels = frames[:, :, -WIDTH // 4 :].astype(float).mean((1, 2, 3))
    return [round(float(level - 30) / 5) for level in levels]


def main() -> None:
    import av

    for name, codec, pixels, options in FILES:
        with av.open(str(CLIPS / name), "w") as file:
            stream = file.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
            for t in range(FRAMES):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), "rgb24")))
            file.mux(stream.encode())


if __name__ == "__main__":
    main()
