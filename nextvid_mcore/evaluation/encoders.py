"""What a probe needs of an encoder, and the encoders of this project: exported, random, raw pixels.

An encoder maps video [B, 3, T, H, W] in [-1, 1] to a list of tokens [B, s, D], one entry a layer asked
for; how it normalises, resizes or treats single frames is its own affair. `build_encoder` turns the text
that a user writes into one:

    DIR                 an exported folder, or a V-JEPA 2 one that tools/import_vjepa2.py wrote
    FILE.pt             a V-JEPA 2 checkpoint as published
    random:RECIPE       random weights in a recipe's shape (random:DIR: in an exported encoder's)
    pixels[:SIDE]       the clip itself, scaled to SIDE x SIDE, as one token
    timm:NAME           a ViT of timm, per frame; timm:NAME=FILE with weights from a file
    transformers:NAME   VideoMAE, V-JEPA 2 or an image ViT of transformers; NAME may be a folder
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, require
from nextvid_mcore.hub import HubError, VisionTransformer, load_config, load_encoder
from nextvid_mcore.hub.export import encoder_config, made_clips
from nextvid_mcore.rng import key

LAST = (-1,)


class Encoder(Protocol):
    """A frozen encoder. Every attribute but `module` is for the data and the report."""

    name: str
    module: nn.Module  # whose weights are frozen, moved and hashed
    image_size: int | None  # the frame it was trained for; None: any
    depth: int  # layers that can be asked for
    per_frame: bool  # frames are encoded one by one, so a still picture is one frame
    frame_multiple: int  # T must be a multiple of it

    def __call__(self, video: Tensor, layers: Sequence[int] = LAST) -> list[Tensor]:
        """Tokens [B, s, D] after each of `layers` (blocks, negative ones from the end)."""
        ...


class Wrapped:
    """An encoder's module and facts; the other encoders build on it."""

    per_frame = False
    frame_multiple = 1

    def __init__(self, name: str, module: nn.Module, image_size: int | None, depth: int) -> None:
        self.name, self.module = name, module.eval().requires_grad_(False)
        self.image_size, self.depth = image_size, depth

    def check_layers(self, layers: Sequence[int]) -> list[int]:
        """`layers` as indices from 0."""
        for layer in layers:
            require(
                -self.depth <= layer < self.depth,
                f"{self.name} has {self.depth} layers and no layer {layer}; ask for fewer with --layers",
            )
        return [layer % self.depth for layer in layers]


class HubEncoder(Wrapped):
    """A `VisionTransformer` of nextvid_mcore.hub, or of `evaluation.vjepa2`, which it is told apart by."""

    def __init__(
        self,
        name: str,
        module: VisionTransformer,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        clips: str = "",
    ) -> None:
        super().__init__(name, module, module.image_size, module.depth)
        self.clips = clips  # what made clips it was trained on, as an export's config.json says it
        self.frame_multiple = module.tubelet_size
        self.mean, self.std = mean, std  # of pixels in [0, 1]; None: it reads [-1, 1]

    def __call__(self, video: Tensor, layers: Sequence[int] = LAST) -> list[Tensor]:
        indices = self.check_layers(layers)
        if self.mean is not None:
            video = renormalise(video, self.mean, self.std)
        kept = self.module(video, return_layers=sorted(set(indices)))
        return [kept[sorted(set(indices)).index(index)] for index in indices]


class PixelEncoder(Wrapped):
    """No encoder at all: a clip scaled to side x side is one token. With --method linear: raw pixels."""

    def __init__(self, side: int) -> None:
        require(side >= 1, f"pixels:{side}: give a side of 1 or more")
        super().__init__(f"pixels:{side}", nn.Identity(), None, 1)
        self.side = side

    def __call__(self, video: Tensor, layers: Sequence[int] = LAST) -> list[Tensor]:
        self.check_layers(layers)
        return [resize(video, self.side).flatten(1)[:, None] for _ in layers]


def renormalise(video: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Video [B, 3, T, H, W] in [-1, 1] -> pixels in [0, 1], less `mean`, by `std`, channel by channel."""
    mean_, std_ = (video.new_tensor(list(x)).reshape(1, 3, 1, 1, 1) for x in (mean, std))
    return ((video + 1) / 2 - mean_) / std_


def resize(video: Tensor, size: int) -> Tensor:
    """[B, 3, T, H, W] -> [B, 3, T, size, size]: bilinear, antialiased; itself where it has that size."""
    if video.shape[-2:] == (size, size):
        return video
    frames = video.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.unflatten(0, (video.shape[0], -1)).transpose(1, 2)


def spread_layers(depth: int, count: int) -> tuple[int, ...]:
    """Blocks whose outputs are used: the last, or `count` over the upper part, as V-JEPA 2 spaces them.

    Its Diving48 probes read blocks 17, 19, 21, 23 of 24 and 24, 29, 34, 39 of 40 (counted from 0). No rule
    is given; steps of depth / 8, which these two are nearly, stand for one. ViT-L gives 14, 17, 20, 23.
    """
    known = {(24, 4): (17, 19, 21, 23), (40, 4): (24, 29, 34, 39)}
    require(1 <= count <= depth, f"{count} encoder layers of {depth}; ask for 1 to {depth} with --layers")
    if (depth, count) in known:
        return known[depth, count]
    step = max(1, min(depth // 8, (depth - 1) // max(1, count - 1)))
    return tuple(depth - 1 - step * (count - 1 - i) for i in range(count))


def identity(encoder: Encoder) -> str:
    """A digest of the encoder's name, kind and every weight: the same encoder, the same features."""
    digest = hashlib.blake2b(f"{type(encoder).__name__} {encoder.depth} ".encode(), digest_size=16)
    digest.update(f"{getattr(encoder, 'side', '')} {getattr(encoder, 'mean', '')}".encode())
    digest.update(f"{getattr(encoder, 'std', '')} {encoder.image_size}".encode())
    for name, value in sorted(encoder.module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def random_encoder(what: str, seed: int) -> HubEncoder:
    """Random weights, a function of the seed, in the shape of a recipe or of an exported folder."""
    if Path(what).is_dir():
        config = load_config(what)
    else:
        run = recipes.get(what)
        config = encoder_config(run, run.stages[-1].frames) | {"clips": made_clips(run)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "init") % 2**32)
        module = VisionTransformer.from_config(config)
    return HubEncoder(f"random:{what}", module, clips=config["clips"])


def build_encoder(spec: str, seed: int = 0) -> Encoder:
    """The encoder that `spec` names (see the module's docstring), on the CPU. `seed`: of random ones."""
    kind, colon, rest = spec.partition(":")
    if kind == "pixels":
        require(not colon or rest.isdecimal(), f"{spec}: write pixels or pixels:SIDE, e.g. pixels:32")
        return PixelEncoder(int(rest or 32))
    if kind == "random":
        require(bool(rest), f"{spec}: write random:RECIPE or random:DIR, e.g. random:tiny")
        return random_encoder(rest, seed)
    if kind in ("timm", "transformers") and colon:
        from nextvid_mcore.evaluation import foreign

        require(bool(rest), f"{spec}: name a model after the colon")
        return foreign.timm_encoder(rest) if kind == "timm" else foreign.transformers_encoder(rest)
    path = Path(spec)
    require(
        path.exists(),
        f"encoder {spec}: no such folder or file; write a folder of tools/convert_to_torch.py, a V-JEPA 2 "
        "checkpoint, or one of random:RECIPE, pixels:SIDE, timm:NAME, transformers:NAME",
    )
    from nextvid_mcore.evaluation import vjepa2

    if path.is_file():
        return vjepa2.encoder(vjepa2.from_checkpoint(path), spec)
    try:
        if json.loads((path / "config.json").read_text()).get("format") == vjepa2.FORMAT:
            return vjepa2.encoder(vjepa2.load(path), spec)
    except (OSError, json.JSONDecodeError, AttributeError):
        pass  # load_encoder says what is wrong with it
    try:
        return HubEncoder(spec, load_encoder(path), clips=load_config(path)["clips"])
    except HubError as error:
        raise ConfigError(f"encoder {spec}: {error}") from None
