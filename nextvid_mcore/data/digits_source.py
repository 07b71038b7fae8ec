"""Moving digits as a pretraining source: `--data.manifest moving-digits` in place of a folder.

Sample i is clip i of (seed, MNIST's training digits); held out are clips of its test digits, of the same
size unless `--data.eval-manifest` says another. Nothing is
decoded, cropped or mirrored: mirrored motion is another class.

The background is mid-grey, the networks' 0, and ink is up to 1. On black, -1, tokens are 95% alike: the
constant is learned first, prediction and features shrink to it, and a short run ends there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nextvid_mcore.config import RunConfig, is_made, require
from nextvid_mcore.data.moving_digits import MovingDigits, load_mnist, parse_source


class DigitClips(MovingDigits):
    """`ClipBatch`es for the loader, with what the loop says of a data set."""

    def clips(self, indices: Sequence[int], frames: int = 16) -> tuple[Tensor, Tensor]:
        """As `MovingDigits.clips`, on grey."""
        video, labels = super().clips(indices, frames)
        plane = 128 + video[:, 0] // 2  # uint8: 128 to 255
        return plane[:, None].expand_as(video), labels

    @property
    def note(self) -> str:
        """Reads MNIST, so a missing package is named before any step."""
        return f"moving digits, {len(load_mnist()[self.split][1]):,} of MNIST's {self.split} split"


def is_digits(source: str) -> bool:
    """A source moving-digits[:SIZE[:SIDE]]; the tools' --data also writes it with a _."""
    return is_made(source.replace("_", "-"))


def side_of(source: str, size: int, trained_on: str | None) -> int | None:
    """Side of the digits of `source` in frames of `size` pixels; None: 28 / 64 of the frame.

    Without numbers they are as large as those that the model was `trained_on`, if it was on digits.
    """
    if ":" not in source:
        source = trained_on if trained_on and is_digits(trained_on) else source
    asked, side = parse_source(source.replace("_", "-"))
    require(
        ":" not in source or asked == size,
        f"{source}: the model reads frames of {size} pixels; write moving-digits or moving-digits:{size}",
    )
    return side


def build(config: RunConfig, source: str, train: bool) -> DigitClips:
    """The clips of a run whose manifest is `source`, moving-digits[:SIZE[:SIDE]]."""
    size = config.model.image_size
    side = side_of(source, size, config.data.manifest)
    return DigitClips("train" if train else "test", size, config.train.seed if train else 0, side=side)
