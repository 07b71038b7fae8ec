"""VA-VAE latents as the target: 16 x 16 pixels of one frame to 32 channels, a tubelet's frames stacked.

Source: Section 3.4 ("latent frames are reorganized as target latent with stacked channels") with the
f16d32 autoencoder of LightningDiT, its checkpoint and its `latents_stats.pt`. Every frame is encoded by
itself; token (t, y, x) holds [frame t * tubelet | next frame | ...], 32 channels each, at (y, x).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from nextvid_mcore.config import ConfigError, ModelConfig, RunConfig, require
from nextvid_mcore.rng import numpy_rng
from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape
from nextvid_mcore.targets.base import check_latents, check_video
from nextvid_mcore.targets.replayed import Replayed
from nextvid_mcore.transfer import to_device

PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the rest of the file is training's
VA_VAE = AutoencoderShape()


class VaVae:
    """A frozen image autoencoder over the frames of a clip; implements `Target`."""

    def __init__(
        self,
        model: ModelConfig,
        autoencoder: AutoencoderKL,
        mean: Tensor,
        std: Tensor,
        *,
        sample_posterior: bool = False,
        seed: int = 0,
        chunk: int = 32,
        fused: bool = False,
        recorded: bool = False,
    ) -> None:
        """`autoencoder` is where and in the dtype it is to run; mean, std: [latent], per channel.

        `chunk` frames go through the network at a time: 32 frames of 256 x 256 need about 0.5 GB an
        activation in bf16. `fused`: the encoder with Triton between its convolutions (fused_vae.py), for
        chunks of one size; `decode` and without it everything runs eagerly, and is the reference.
        `recorded`: the fused encoder as a CUDA graph (replayed.py).
        """
        require(chunk > 0, f"frames per chunk must be positive, got {chunk}")
        self.model = model
        self.channels = self.channels_for(model, autoencoder.shape)
        self.autoencoder = autoencoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        weight = autoencoder.quant_conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.mean, self.std = (
            part.detach().to(self.device, torch.float32).reshape(1, -1, 1, 1) for part in (mean, std)
        )
        self.sample_posterior, self.seed = sample_posterior, seed
        self.chunk, self.fused = chunk, fused
        self._network = self.autoencoder.encode
        if fused:
            from nextvid_mcore.targets.fused_vae import FusedEncoder  # Triton is not installed everywhere

            network = FusedEncoder(self.autoencoder)
            self._network = Replayed(network, "VA-VAE's encoder") if recorded else network

    @staticmethod
    def channels_for(model: ModelConfig, shape: AutoencoderShape = VA_VAE) -> int:
        """C = tubelet * latent; ConfigError unless one latent position is one token."""
        stride = shape.stride
        require(
            model.image_size % stride == 0,
            f"target va_vae needs an image size that is a multiple of {stride}, got {model.image_size}",
        )
        require(
            model.patch_size == stride,
            f"target va_vae makes one latent of {stride} x {stride} pixels, but the patch size is "
            f"{model.patch_size}: set --model.patch-size {stride} or --target.kind pixels",
        )
        return model.tubelet_size * shape.latent

    @classmethod
    def from_files(cls, config: RunConfig, device: torch.device | str, dtype: torch.dtype) -> VaVae:
        """Load what --target.checkpoint and --target.statistics name."""
        target = config.target
        require(
            target.checkpoint is not None,
            "target va_vae needs --target.checkpoint FILE: VA-VAE f16d32's weights, a torch file with the "
            "tensors under `state_dict` (or at its top), or .safetensors; --target.kind pixels needs none",
        )
        require(
            target.statistics is not None,
            "target va_vae needs --target.statistics FILE: its latents_stats.pt, a torch file that holds "
            f"`mean` and `std` of shape (1, {VA_VAE.latent}, 1, 1)",
        )
        shape = shape_of(target.checkpoint)
        mean, std = load_statistics(target.statistics, shape.latent)
        autoencoder = load_autoencoder(target.checkpoint, shape).to(device, dtype)
        return cls(
            config.model,
            autoencoder,
            mean,
            std,
            sample_posterior=target.sample_posterior,
            seed=config.train.seed,
            chunk=target.chunk,
            fused=target.compile and fuses(device, dtype),
            recorded=config.train.cuda_graphs != "off",
        )

    @torch.no_grad()
    def latents(
        self,
        video: Tensor,
        static: Tensor | None = None,
        indices: Sequence[int] | None = None,
        first: int = 0,
    ) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> normalised [B, t - first, n, C].

        Only one frame of a static clip goes through the network. With `sample_posterior` every
        frame gets its own noise, a function of (seed, index of the clip), static or not.
        """
        check_video(video, self.model)
        skipped = first * self.model.tubelet_size
        video = video[:, :, skipped:]
        B, _, T = video.shape[:3]
        needed = torch.ones(B, T, dtype=torch.bool)
        if static is not None:
            require(
                static.dtype == torch.bool and static.shape == (B,),
                f"static must be bool [{B}], got {static.dtype} {tuple(static.shape)}",
            )
            needed[static.cpu(), 1:] = False
        places = needed.nonzero()  # [frames to encode, (clip, frame)]
        count = len(places)
        if self.fused:  # chunks of one size: the last is filled up with copies of a frame
            places = torch.cat([places, places[-1:].expand(-count % self.chunk, -1)])
        clips, frames = to_device(places.T.contiguous(), self.device)
        by_frame = video.transpose(1, 2)  # [B, T, 3, H, W]
        mean, logvar = self._chunks(
            lambda i: self._encode(self._prepare(by_frame[clips[i], frames[i]])), len(places)
        )
        mean, logvar = mean[:count], logvar[:count]
        if count < B * T:
            # A static clip's later frames do not advance the count: they point at its first frame.
            slots = to_device(needed.flatten().cumsum(0) - 1, self.device)
            mean, logvar = mean[slots], logvar[slots]
        values = mean
        if self.sample_posterior:
            require(
                indices is not None and len(indices) == B,
                f"sampling the posterior needs the global index of each of the {B} clips, got {indices}",
            )
            values = mean + (0.5 * logvar).exp() * self._noise(indices, T, skipped, mean.shape)
        values = (values - self.mean) / self.std
        return rearrange(values, "(b t k) z h w -> b t (h w) (k z)", b=B, k=self.model.tubelet_size)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised [B, t, n, C] -> [B, 3, T, H, W] float32."""
        check_latents(latents, self.model, self.channels)
        values = rearrange(
            latents.to(self.device, torch.float32),
            "b t (h w) (k z) -> (b t k) z h w",
            h=self.model.grid,
            k=self.model.tubelet_size,
        )
        values = values * self.std + self.mean
        (frames,) = self._chunks(lambda i: (self.autoencoder.decode(self._prepare(values[i])),), len(values))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=latents.shape[0])

    def _chunks(self, work: Callable[[slice], tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
        """Apply `work` to slices of at most `chunk` frames; join each of its results in float32."""
        parts = [work(slice(start, start + self.chunk)) for start in range(0, count, self.chunk)]
        return tuple(torch.cat([part.float() for part in column]) for column in zip(*parts, strict=True))

    def _encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        # With one shape of input cuDNN may try its kernels once and keep the fastest.
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or self.fused
        try:
            return self._network(frames)
        finally:
            torch.backends.cudnn.benchmark = before

    def _prepare(self, frames: Tensor) -> Tensor:
        return frames.to(self.device, self.dtype, memory_format=torch.channels_last)

    def _noise(self, indices: Sequence[int], T: int, skipped: int, shape: torch.Size) -> Tensor:
        """Standard normal [B * T, latent, h, w], drawn clip by clip on the CPU: the same on any device.

        What the `skipped` frames before would have got is drawn and dropped.
        """
        size = (skipped + T, *shape[1:])
        draws = [
            numpy_rng(self.seed, "posterior", int(i)).standard_normal(size, dtype="float32") for i in indices
        ]
        return torch.cat([torch.from_numpy(draw[skipped:]) for draw in draws]).to(self.device)


def fuses(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the fused encoder may stand for the eager one: its SiLU is as exact as half precision."""
    return torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def read_tensors(path: str, flag: str) -> dict[str, Tensor]:
    """The named tensors of a torch file (unwrapped from `state_dict`) or a .safetensors file."""
    require(Path(path).is_file(), f"{flag} {path}: no such file")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        # Only the zip format can be mapped; older files are read whole.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{flag} {path} is not a torch file of plain tensors; if it is one of more than that, and you "
            "trust it, load it once with weights_only=False and save its state_dict alone"
        ) from error
    except Exception as error:  # an unpickler raises anything on a foreign file
        raise ConfigError(f"{flag} {path} cannot be read: {error!r:.80}") from error
    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded)
    require(isinstance(loaded, dict), f"{flag} {path} holds a {type(loaded).__name__}, not named tensors")
    return loaded


def shape_of(path: str) -> AutoencoderShape:
    """The sizes that a checkpoint's tensors have; VA-VAE's own where they tell nothing, so that loading it
    then says what is missing. Four entries fix the shape: whether all others fit it, loading checks.
    """
    sizes = {
        k: v.shape for k, v in read_tensors(path, "--target.checkpoint").items() if isinstance(v, Tensor)
    }
    require(
        any(key.startswith(PREFIXES) for key in sizes),
        f"--target.checkpoint {path} is no autoencoder's: it holds {_some(sorted(sizes)) or 'no tensors'}",
    )
    levels, blocks = 0, 0
    while f"encoder.down.{levels}.block.0.conv2.weight" in sizes:
        levels += 1
    while f"encoder.down.0.block.{blocks}.conv2.weight" in sizes:
        blocks += 1
    first, latent = sizes.get("encoder.conv_in.weight"), sizes.get("post_quant_conv.weight")
    if not (levels and first and latent):
        return VA_VAE
    width = first[0]
    widths = [sizes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)]
    require(
        width > 0 and all(each % width == 0 for each in widths),
        f"--target.checkpoint {path} is not this autoencoder: its levels are {widths} channels wide, which "
        f"are no multiples of the first convolution's {width}",
    )
    return AutoencoderShape(width, tuple(each // width for each in widths), blocks, latent[0])


def load_autoencoder(path: str, shape: AutoencoderShape | None = None) -> AutoencoderKL:
    """The autoencoder of a checkpoint, on the CPU: every key and shape must be there, none to spare.

    shape: its sizes where they are known already (`shape_of`).
    """
    shape = shape or shape_of(path)
    tensors = read_tensors(path, "--target.checkpoint")
    found = {k: v for k, v in tensors.items() if isinstance(v, Tensor) and k.startswith(PREFIXES)}
    with torch.device("meta"):
        autoencoder = AutoencoderKL(shape)
    wanted = autoencoder.state_dict()
    troubles = []
    for what, keys in (("missing", wanted.keys() - found.keys()), ("surplus", found.keys() - wanted.keys())):
        if keys:
            troubles.append(f"{len(keys)} {what} ({_some(sorted(keys))})")
    reshaped = [
        f"{k} is {tuple(found[k].shape)} instead of {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in found and found[k].shape != v.shape
    ]
    if reshaped:
        troubles.append(f"{len(reshaped)} of another shape ({_some(reshaped)})")
    require(
        not troubles,
        f"--target.checkpoint {path} is not this autoencoder (f{shape.stride}d{shape.latent}, width "
        f"{shape.width}): {', '.join(troubles)}",
    )
    autoencoder.load_state_dict(found, strict=True, assign=True)
    return autoencoder


def load_statistics(path: str, channels: int) -> tuple[Tensor, Tensor]:
    """`mean` and `std`, [channels] each, of a latents_stats.pt."""
    flag = "--target.statistics"
    found = read_tensors(path, flag)
    for name in ("mean", "std"):
        require(name in found, f"{flag} {path} has no `{name}`; it holds {_some(sorted(map(str, found)))}")
        require(
            isinstance(found[name], Tensor) and found[name].numel() == channels,
            f"{flag} {path}: `{name}` must have shape (1, {channels}, 1, 1), got "
            f"{tuple(getattr(found[name], 'shape', ()))}",
        )
    mean, std = (found[name].float().flatten() for name in ("mean", "std"))
    require(
        bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()),
        f"{flag} {path}: mean and std must be finite and std positive; the smallest std is {std.min():.3g}",
    )
    return mean, std


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
