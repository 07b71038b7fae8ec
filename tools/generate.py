"""Draw what a run generates: held-out clips, what the encoder sees of them, and the next frames from that.

    python tools/generate.py RUN [--export RUN/encoder] [--out RUN/plots/generated.png]
        [--clips 2] [--skip 0] [--frames T] [--mask 1] [--steps 20]

The export is a folder of `tools/convert_to_torch.py RUN --out DIR --all`; RUN/config.json says which clips,
masks and target. Every frame is predicted from the visible tokens of the true frames before it, as in
training (Eq. 3), and integrated from noise with the midpoint rule. On the CPU, with plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextvid_mcore import flow, hub
from nextvid_mcore.config import ConfigError, RunConfig, require
from nextvid_mcore.data.loader import build_dataset
from nextvid_mcore.data.transforms import normalize
from nextvid_mcore.evaluation.pictures import prediction_grid, visible_map
from nextvid_mcore.hub.export import run_config
from nextvid_mcore.masking import draw_masks
from nextvid_mcore.rng import torch_generator
from nextvid_mcore.targets import build_target


@dataclass(frozen=True)
class Networks:
    """The three exported networks."""

    encoder: hub.VisionTransformer
    predictor: hub.Predictor
    decoder: hub.Decoder

    @classmethod
    def load(cls, folder: Path) -> Networks:
        return cls(hub.load_encoder(folder), hub.load_predictor(folder), hub.load_decoder(folder))

    @torch.no_grad()
    def generate(self, video: Tensor, tokens: Tensor, noise: Tensor, steps: int) -> Tensor:
        """video [1, 3, T, H, W], visible tokens [1, s], noise [1, p, n, C] -> latents [1, p, n, C]."""
        p = noise.shape[1]
        z, _ = self.predictor(self.encoder(video, tokens), tokens, frames=range(1, p + 1))

        def velocity(x: Tensor, tau: float) -> Tensor:
            return self.decoder(x.flatten(1, 2), torch.full((1, p), tau), z).view_as(x)

        return flow.midpoint(velocity, noise, steps)


def read_run(run: Path) -> RunConfig:
    """The settings that a run wrote."""
    path = run / "config.json"
    require(path.exists(), f"{path} does not exist; give a run, the --out of nextvid_mcore.pretrain")
    return run_config(json.loads(path.read_text()))


def draw(config: RunConfig, networks: Networks, args: argparse.Namespace) -> None:
    """Generate the held-out clips `skip` .. `skip + clips` and write the picture."""
    model, data = config.model, build_dataset(config, train=False)
    target = build_target(config, "cpu", torch.float32)
    frames = args.frames or config.stages[0].frames
    t = model.token_frames(frames)
    require(
        1 <= args.mask <= len(config.mask.blocks),
        f"--mask {args.mask}: the run has masks 1 to {len(config.mask.blocks)}",
    )
    videos, truths, generated, seen, titles = [], [], [], [], []
    for index in range(args.skip, args.skip + args.clips):
        sample = data.sample(index, frames)
        video = normalize(sample.video[None])
        masks = draw_masks(config.mask, model.grid, t - 1, config.train.seed, [index])
        tokens = next(masks.of(part) for part in masks.segments if part.mask == args.mask - 1)
        truth = target.latents(video, indices=[index])
        noise = torch.randn(
            1, t - 1, *truth.shape[2:], generator=torch_generator(config.train.seed, "noise", index)
        )
        videos.append(video)
        truths.append(truth)
        generated.append(networks.generate(video, tokens, noise, args.steps))
        seen.append(visible_map(masks, args.mask - 1, t))
        titles.append(Path(sample.item).name)
    prediction_grid(
        target, *(torch.cat(parts) for parts in (videos, truths, generated, seen)), args.out, titles=titles
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--export", type=Path, help="folder of the exported networks (default RUN/encoder)")
    parser.add_argument("--out", type=Path, help="the picture (default RUN/plots/generated.png)")
    parser.add_argument("--clips", type=int, default=2, help="how many held-out clips")
    parser.add_argument("--skip", type=int, default=0, help="held-out clips to pass over first")
    parser.add_argument("--frames", type=int, help="of a clip (default: the first stage's)")
    parser.add_argument("--mask", type=int, default=1, help="number of the mask, from 1")
    parser.add_argument("--steps", type=int, default=20, help="of the solver")
    args = parser.parse_args()
    args.out = args.out or args.run / "plots" / "generated.png"
    try:
        require(args.clips >= 1 and args.skip >= 0, "--clips must be 1 or more and --skip 0 or more")
        draw(read_run(args.run), Networks.load(args.export or args.run / "encoder"), args)
    except (ConfigError, hub.HubError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
