"""From pictures and videos to the encoder's input: largest centred square, bilinear resize, [-1, 1].

The same steps as in evaluation, with torch alone; a picture becomes a clip of equal frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin


class NextVidProcessor(ImageProcessingMixin):
    """AutoImageProcessor's: what is given without a name is pictures."""

    model_input_names = ["pixel_values_videos"]

    def __init__(
        self, size: int | dict[str, int] = 256, num_frames: int = 16, tubelet_size: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.size = size["height"] if isinstance(size, dict) else size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size

    def __call__(
        self,
        images: Any = None,
        videos: Any = None,
        num_frames: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """`pixel_values_videos` [B, T, 3, size, size].

        images: a picture or a list: PIL images, or uint8 arrays and tensors [H, W, 3] or [3, H, W].
        videos: a clip or a list: uint8 [T, H, W, 3] or [T, 3, H, W], or a list of pictures. All frames are
            kept, so sample them first (4 a second in the pretraining); T a multiple of the tubelet size.
        num_frames: of a picture's clip (default: the pretraining's); a clip has those that it has.
        """
        if (images is None) == (videos is None):
            raise ValueError("give either images or videos")
        if videos is not None and num_frames is not None:
            raise ValueError(
                f"num_frames {num_frames} is of a picture's clip; of a clip all frames are kept: give "
                f"it with those wanted, e.g. video[::step][:{num_frames}]"
            )
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}: only 'pt' is there")
        if images is not None:
            several = isinstance(images, Sequence) or getattr(images, "ndim", 3) == 4
            frames = num_frames or self.num_frames
            clips = [
                self._clip(image).expand(frames, -1, -1, -1) for image in (images if several else [images])
            ]
        else:
            clips = [self._clip(video) for video in self._several(videos)]
        lengths = {len(clip) for clip in clips}
        if len(lengths) != 1 or lengths.pop() % self.tubelet_size:
            raise ValueError(
                f"clips have {[len(clip) for clip in clips]} frames: give equal numbers, multiples of "
                f"{self.tubelet_size}"
            )
        return BatchFeature({"pixel_values_videos": torch.stack(clips)})

    def to_dict(self) -> dict[str, Any]:
        """Both processors' names, whichever is saved: transformers would put its own in either place."""
        names = {"image": "NextVidProcessor", "video": "NextVidVideoProcessor"}
        return super().to_dict() | {
            "auto_map": {f"Auto{k.title()}Processor": f"processing_nextvid.{v}" for k, v in names.items()},
            **{f"{kind}_processor_type": name for kind, name in names.items()},
        }

    @staticmethod
    def _several(videos: Any) -> list:
        """A list of clips, of one clip or several."""
        if isinstance(videos, Sequence) and len(videos) and not isinstance(videos, str):
            first = videos[0]
            one = not isinstance(first, Sequence) and getattr(first, "ndim", 3) == 3  # a list of pictures
            return [videos] if one else list(videos)
        return list(videos) if getattr(videos, "ndim", 0) == 5 else [videos]

    def _clip(self, frames: Any) -> Tensor:
        """A picture or a clip -> float [T, 3, size, size] in [-1, 1]."""
        if isinstance(frames, str) or (isinstance(frames, Sequence) and not len(frames)):
            raise ValueError(f"got {frames!r}: give decoded pictures, uint8 arrays or PIL images")
        if isinstance(frames, Sequence):
            return torch.cat([self._clip(frame) for frame in frames])
        if hasattr(frames, "convert"):  # PIL
            frames = np.array(frames.convert("RGB"))
        if isinstance(frames, np.ndarray) and not frames.flags.writeable:
            frames = frames.copy()  # np.asarray of a PIL image; torch warns of it
        x = torch.as_tensor(frames)
        x = x[None] if x.dim() == 3 else x
        if x.dim() != 4 or x.dtype != torch.uint8 or 3 not in (x.shape[1], x.shape[-1]):
            fix = "; of floats in [0, 1]: (x * 255).round() as uint8" if x.is_floating_point() else ""
            raise ValueError(
                f"got {x.dtype} of shape {tuple(x.shape)}: give uint8 pictures of 3 channels{fix}"
            )
        x = x if x.shape[1] == 3 else x.permute(0, 3, 1, 2)
        side = min(x.shape[-2:])
        top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
        x = x[..., top : top + side, left : left + side]
        if side != self.size:
            size = (self.size, self.size)
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return x.float() / 127.5 - 1.0


class NextVidVideoProcessor(NextVidProcessor):
    """AutoVideoProcessor's: what is given without a name is a clip, or several."""

    def __call__(self, videos: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        return super().__call__(images=images, videos=videos, **kwargs)
