"""Train a small autoencoder of VA-VAE's interface on a manifest's clips, for latent runs without a download.

    python tools/train_vae.py --manifest data/demo/manifest --out runs/vae      (or moving-digits)
        [--size 64] [--width 32] [--multipliers 1,2,2,4] [--blocks 1] [--latent 8]
        [--steps 2000] [--batch 8] [--frames 2] [--lr 1e-3] [--kl 1e-6] [--seed 0] [--device cpu]

OUT gets autoencoder.pt ({"state_dict"}), latents_stats.pt ({"mean", "std"}, (1, latent, 1, 1)) in the format
of VA-VAE's files, reconstructions.png and losses.jsonl. Use them with

    --target.kind va_vae --target.checkpoint OUT/autoencoder.pt --target.statistics OUT/latents_stats.pt
    --model.patch-size 8          (2 to the number of multipliers less one)

Loss: mean absolute error + mean squared error + kl * KL divergence, of single frames. This is no VA-VAE: it
has neither its alignment to a vision model nor its perceptual and adversarial losses. Samples, noise and
weights are functions of the seed. Stopped (Ctrl-C, SIGTERM), it saves first, and the same command goes on
(OUT/training.pt); the exit status is then 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from nextvid_mcore.config import ConfigError, DataConfig, require  # noqa: E402
from nextvid_mcore.data.digits_source import DigitClips  # noqa: E402
from nextvid_mcore.data.guard import DataError  # noqa: E402
from nextvid_mcore.data.loader import ClipDataset, iterate  # noqa: E402
from nextvid_mcore.data.manifest import Manifest  # noqa: E402
from nextvid_mcore.data.moving_digits import parse_source  # noqa: E402
from nextvid_mcore.data.sampler import build_mixture  # noqa: E402
from nextvid_mcore.data.transforms import normalize  # noqa: E402
from nextvid_mcore.evaluation.ranks import device_of  # noqa: E402
from nextvid_mcore.evaluation.results import writable_folder  # noqa: E402
from nextvid_mcore.evaluation.stopping import Stop, Stopped  # noqa: E402
from nextvid_mcore.rng import key, numpy_rng  # noqa: E402
from nextvid_mcore.targets.autoencoder import AutoencoderKL, AutoencoderShape  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """All that the result depends on."""

    manifest: str
    size: int = 64
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 1
    latent: int = 8
    steps: int = 2000
    batch: int = 8  # clips of a step
    frames: int = 2  # of a clip; each is a picture of its own
    lr: float = 1e-3
    kl: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "blocks", "latent", "steps", "batch", "frames", "lr"):
            require(getattr(self, name) > 0, f"--{name} must be positive, got {getattr(self, name)}")
        require(self.seed >= 0, f"--seed must be 0 or more, got {self.seed}")
        require(self.kl >= 0, f"--kl must be 0 or more, got {self.kl}")
        require(
            len(self.multipliers) > 0 and min(self.multipliers) >= 1,
            f"--multipliers must be whole numbers from 1, got {self.multipliers}",
        )
        require(
            self.size % self.shape.stride == 0,
            f"--size {self.size} is not divisible by {self.shape.stride}, the stride of "
            f"{len(self.multipliers)} multipliers",
        )

    @property
    def shape(self) -> AutoencoderShape:
        return AutoencoderShape(self.width, self.multipliers, self.blocks, self.latent)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the steps, then a cosine to a hundredth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def clips(settings: Settings) -> ClipDataset | DigitClips:
    """What the pictures are frames of."""
    made = parse_source(settings.manifest)
    if made is not None:
        return DigitClips("train", settings.size, settings.seed, side=made[1])
    manifest = Manifest.open(settings.manifest)
    data = DataConfig(manifest=settings.manifest)
    return ClipDataset(data, settings.size, manifest, build_mixture(manifest), settings.seed, train=True)


def pictures(settings: Settings, first: int, steps: int, workers: int):  # noqa: ANN201 (an iterator)
    """(global sample indices, frames [batch * frames, 3, size, size] in [-1, 1]) of `steps` steps."""
    dataset = clips(settings)
    wanted = [
        (settings.frames, tuple(range(step * settings.batch, (step + 1) * settings.batch)))
        for step in range(first, first + steps)
    ]
    for batch in iterate(dataset, wanted, workers=workers):
        yield batch.index.tolist(), normalize(batch.video).transpose(1, 2).flatten(0, 1)


def posterior_noise(settings: Settings, indices: list[int], shape: torch.Size) -> Tensor:
    """Standard normal of `shape`, drawn clip by clip."""
    size = (shape[0] // len(indices), *shape[1:])
    draws = [numpy_rng(settings.seed, "posterior", i).standard_normal(size, dtype="float32") for i in indices]
    return torch.cat([torch.from_numpy(draw) for draw in draws])


def losses(model: AutoencoderKL, frames: Tensor, noise: Tensor, kl: float) -> dict[str, Tensor]:
    """`loss` and its parts; noise like the latents."""
    mean, logvar = model.encode(frames)
    rebuilt = model.decode(mean + (0.5 * logvar).exp() * noise)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    l1, l2 = F.l1_loss(rebuilt, frames), F.mse_loss(rebuilt, frames)
    return {"loss": l1 + l2 + kl * divergence, "l1": l1, "l2": l2, "kl": divergence}


def replace_file(value: object, path: Path) -> None:
    """torch.save that leaves the old file or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    torch.save(value, scratch)
    os.replace(scratch, path)


class Training:
    """The autoencoder, its optimizer and the number of finished steps; on disk in OUT/training.pt."""

    def __init__(self, settings: Settings, out: Path, device: str) -> None:
        self.settings, self.out, self.device = settings, out, device_of(device)
        writable_folder(out)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(settings.seed, "init"))
            self.model = AutoencoderKL(settings.shape)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.lr, (0.9, 0.95), weight_decay=0)
        self.step, self.rows = 0, []
        if (out / "training.pt").exists():
            self.resume()

    def resume(self) -> None:
        path = self.out / "training.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # an unpickler raises anything on a torn file
            raise ConfigError(f"{path} cannot be read ({error!r:.80}); delete it to start again") from None
        mine, theirs = plain(self.settings), state["settings"]
        other = [f"{k} {theirs.get(k)} (now {mine[k]})" for k in mine if mine[k] != theirs.get(k)]
        require(
            not other,
            f"--out {self.out} holds a run with other settings: {', '.join(other)}; name another folder",
        )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows = state["step"], state["rows"]

    def save(self) -> None:
        replace_file(
            {
                "settings": plain(self.settings),
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rows": self.rows,
            },
            self.out / "training.pt",
        )

    def run(
        self,
        *,
        workers: int,
        save_every: int,
        progress: bool,
        stop: int | None = None,
        told: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the last step, or to step `stop`, or until `told`. Whether it was the last one."""
        from tqdm import tqdm

        settings, end = self.settings, min(self.settings.steps, stop or self.settings.steps)
        with tqdm(total=settings.steps, initial=self.step, unit="step", disable=not progress) as bar:
            for indices, frames in pictures(settings, self.step, max(0, end - self.step), workers):
                frames = frames.to(self.device)
                side = settings.size // settings.shape.stride
                shape = torch.Size((len(frames), settings.latent, side, side))
                noise = posterior_noise(settings, indices, shape).to(self.device)
                terms = losses(self.model, frames, noise, settings.kl)
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.learning_rate(self.step)
                self.optimizer.zero_grad()
                terms["loss"].backward()
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                if not math.isfinite(norm):
                    raise DataError(f"step {self.step}: the gradient is not finite; lower --lr")
                self.optimizer.step()
                self.step += 1
                values = {name: value.item() for name, value in terms.items()}
                self.rows.append({"step": self.step, **values})
                bar.update()
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                halted = told()
                if halted or self.step % save_every == 0 or self.step == end:
                    self.save()
                if halted:
                    break
        return self.step == settings.steps

    @torch.no_grad()
    def finish(self, workers: int, samples: int) -> dict[str, float]:
        """Write the two files of VA-VAE's format and the rest; the error on crops drawn afterwards."""
        settings, model = self.settings, self.model.eval()
        totals = [torch.zeros(settings.latent, dtype=torch.float64) for _ in range(2)]
        error, shown = 0.0, []
        steps = -(-samples // settings.batch)
        count = 0
        for _, frames in pictures(settings, settings.steps, steps, workers):
            frames = frames.to(self.device)
            mean, _ = model.encode(frames)
            values = mean.transpose(0, 1).flatten(1).double().cpu()
            totals = [totals[0] + values.sum(1), totals[1] + values.square().sum(1)]
            count += values.shape[1]
            rebuilt = model.decode(mean)
            error += F.mse_loss(rebuilt, frames).item() / steps
            shown.append((frames[0].cpu(), rebuilt[0].cpu()))
        mean = totals[0] / count
        std = (totals[1] / count - mean.square()).clamp_min(1e-12).sqrt()
        statistics = {"mean": mean, "std": std}
        replace_file(
            {k: v.float().reshape(1, -1, 1, 1) for k, v in statistics.items()}, self.out / "latents_stats.pt"
        )
        weights = {k: v.cpu() for k, v in model.state_dict().items()}
        replace_file({"state_dict": weights}, self.out / "autoencoder.pt")
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        (self.out / "losses.jsonl").write_text(lines)
        draw(shown, self.out / "reconstructions.png")
        return {"mse": error, "psnr": 10 * math.log10(4 / error), "samples": steps * settings.batch}


def draw(pairs: list[tuple[Tensor, Tensor]], path: Path, columns: int = 8) -> None:
    """Originals above reconstructions, each [3, H, W]."""
    from nextvid_mcore.evaluation.strips import Panel, Strip, write_png

    panels = [
        Panel(name, torch.stack([pair[i] for pair in pairs[:columns]], dim=1))
        for i, name in enumerate(("original", "rebuilt"))
    ]
    title = "crops drawn after the last step of training"
    write_png([Strip(title, panels)], path, "Reconstructions", word="crop")


def plain(settings: Settings) -> dict:
    """As it is kept in training.pt."""
    return dataclasses.asdict(settings) | {"multipliers": list(settings.multipliers)}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    for field in dataclasses.fields(Settings):
        kind = numbers if field.name == "multipliers" else type(field.default)
        if field.name == "manifest":
            parser.add_argument("--manifest", required=True, help="of tools/build_manifest.py")
        else:
            parser.add_argument(
                f"--{field.name}", type=kind, default=field.default, help=f"default: {field.default}"
            )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="loader processes; 0: none")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--samples", type=int, default=256, help="clips of the statistics")
    args = parser.parse_args()
    try:
        require(args.samples >= 1 and args.save_every >= 1, "--samples and --save-every must be 1 or more")
        names = [field.name for field in dataclasses.fields(Settings)]
        require(args.workers >= 0, f"--workers must be 0 or more, got {args.workers}")
        settings = Settings(**{name: getattr(args, name) for name in names})
        training = Training(settings, args.out, args.device)
        millions = sum(p.numel() for p in training.model.parameters()) / 1e6
        print(f"{millions:.2f}M parameters; step {training.step} of {settings.steps}", flush=True)
        with Stop() as stop:
            with stop.gently():
                done = training.run(
                    workers=args.workers, save_every=args.save_every, progress=True, told=stop
                )
            if not done:
                raise Stopped
            found = training.finish(args.workers, args.samples)
    except Stopped:
        print(f"stopped before the end; the same command goes on from {args.out}")
        return 3
    except (ConfigError, OSError) as error:
        print(f"train_vae: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: mean squared error {found['mse']:.4f} (PSNR {found['psnr']:.1f} dB)", end="")
    print(f" on {found['samples']} clips drawn after training")
    stride = settings.shape.stride
    print(
        f"use it with --target.kind va_vae --target.checkpoint {quote(str(args.out / 'autoencoder.pt'))} "
        f"--target.statistics {quote(str(args.out / 'latents_stats.pt'))} --model.patch-size {stride}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
