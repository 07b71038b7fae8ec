"""Export a run to plain PyTorch, and prove it: reload the export and compare it with the training model.

    python tools/convert_to_torch.py RUN_OR_CHECKPOINT --out DIR [--weights ema|online] [--all] [--force]

Reads a checkpoint of any layout in one process on the CPU, in fp32. The folder holds config.json and
model.safetensors (the encoder), with --all predictor.safetensors and decoder.safetensors; load it with
`nextvid_mcore.hub.load_encoder(DIR)`. Only the encoder has an EMA: predictor and decoder are always
the trained ("online") ones. Of an ablation (recipes/ablations.py) with another predictor or decoder than
the full model's the encoder alone can be exported; --all says so.

--format hf writes a folder for `transformers.AutoModel.from_pretrained(DIR, trust_remote_code=True)` instead:
the encoder with an image and video processor and a model card (nextvid_mcore/hub/hf).

The folder is written under another name, loaded into fresh hub networks and compared with the
training model on real clips: those of --clips, else of the run's manifest, else a seeded synthetic
clip. Above the tolerance nothing is left and the exit status is 1; it is 2 for a wrong setting.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact fp32 on every machine
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # one process, whatever started it
        os.environ.pop(name, None)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from nextvid_mcore import flops  # noqa: E402
from nextvid_mcore.config import ConfigError, Fp8Config, RunConfig, is_made, require  # noqa: E402
from nextvid_mcore.evaluation import clips as clip_files  # noqa: E402
from nextvid_mcore.evaluation.results import writable_folder  # noqa: E402
from nextvid_mcore.hub import FILES, HubError, export, load_decoder, load_encoder, load_predictor  # noqa: E402
from nextvid_mcore.hub.hf import write as hf  # noqa: E402

if TYPE_CHECKING:
    from nextvid_mcore.models.nextvid import NextVid
    from nextvid_mcore.parallel.groups import RoleGroups

CLIPS = 2  # compared
TRIED = 50  # files, until so many are decoded


class Mismatch(Exception):
    """The export computes something else than the training model."""


@dataclass(frozen=True)
class Difference:
    """How far an output of the export is from the training model's."""

    what: str
    largest: float  # absolute difference
    scale: float  # largest absolute value of the training model's output

    def good(self, tolerance: float) -> bool:
        return self.largest <= tolerance  # False for nan


# The clips ---------------------------------------------------------------------------------------


def compared_clips(config: RunConfig, clips: str | None) -> tuple[Tensor, str]:
    """Clips [B, 3, T, H, W] in [-1, 1], T of the shortest stage, and where they come from."""
    frames, size = min(stage.frames for stage in config.stages), config.model.image_size
    manifest = config.data.manifest
    if clips is None and is_made(manifest):
        from nextvid_mcore.data.loader import build_dataset
        from nextvid_mcore.data.transforms import normalize

        return normalize(build_dataset(config)[frames, range(CLIPS)].video), f"clips of {manifest}"
    if clips is None and (manifest is None or not Path(manifest).exists()):
        generator = torch.Generator().manual_seed(0)
        video = torch.rand(CLIPS, 3, frames, size, size, generator=generator) * 2 - 1
        missing = "names no manifest" if manifest is None else f"read {manifest}, which isn't here"
        return video, f"SYNTHETIC clips (seeded noise): the run {missing}; give real ones with --clips"

    require(clips is None or Path(clips).exists(), f"--clips {clips}: no such file or folder")
    source = clips or manifest
    items = sorted(clip_files.find(source, TRIED).items, key=lambda item: item.kind != "video")
    read = clip_files.read_all(clip_files.Items(items), frames, size, config.data.fps)
    found = [clip.video for clip in itertools.islice(read, CLIPS)]
    require(len(found) > 0, f"{source} holds no clip that can be decoded; give others with --clips")
    return torch.stack(found), f"real clips of {source}"


# The training model ------------------------------------------------------------------------------


def one_process() -> RoleGroups:
    """Process groups of a world of one."""
    from nextvid_mcore.parallel.groups import Layout, build_groups, init_distributed

    init_distributed()
    return build_groups(Layout())


def build_model(config: RunConfig, channels: int, groups: RoleGroups) -> NextVid:
    """The training model in fp32 on this process, all its weights nan until a checkpoint fills them."""
    from nextvid_mcore.models.nextvid import NextVid
    from nextvid_mcore.models.places import together
    from nextvid_mcore.models.specs import Split

    model = dataclasses.replace(config.model, backend="local")
    config = dataclasses.replace(config, model=model, fp8=Fp8Config())  # the weights are the same
    network = NextVid(config, together(Split(), groups.collection), channels).eval()
    del network.reference  # a copy of the encoder that nothing here needs
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    return network.requires_grad_(False)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint itself, or the newest whole one of a run."""
    from nextvid_mcore.training import checkpoint

    require(path.is_dir(), f"{path}: no such folder; give a run or one of its checkpoints")
    if (path / checkpoint.STATE).exists():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = checkpoint.latest(folder)
    require(found is not None, f"{folder} holds no whole checkpoint; give a run or one of its checkpoints")
    return found


@contextlib.contextmanager
def still_there(path: Path) -> Iterator[None]:
    """A run that goes on deletes its old checkpoints: that is why one can't be read, and is said."""
    try:
        yield
    except Exception as error:
        if path.exists():
            raise
        raise ConfigError(
            f"{path} was deleted while it was read: the run goes on and keeps its newest checkpoints alone; "
            "convert again, or let it keep more with --checkpoint.keep"
        ) from error


def load_model(path: Path, weights: str, everything: bool) -> tuple[NextVid, int]:
    """The training model of a checkpoint of any layout, and its finished steps.

    `weights` are the encoder's. All else was trained with the online encoder and has no average of its
    own that would fit it, so it is loaded as it is, the projection of the context included.
    """
    from nextvid_mcore.targets import target_channels
    from nextvid_mcore.training import checkpoint

    state = checkpoint.read_state(path)
    config, groups = export.run_config(state["config"]), one_process()
    if everything:
        export.check_generator(config.model)
    model = build_model(config, target_channels(config) if config.model.generate else 0, groups)
    checkpoint.load_weights(path, model.roles(), groups, "online")
    if weights == "ema":
        checkpoint.load_weights(path, {"student.encoder": model.student.encoder}, groups, "ema")
    return model, int(state["step"])


def hub_states(model: NextVid, everything: bool) -> dict[str, dict[str, Tensor]]:
    """The networks' states under the hub's names."""
    shapes = model.run.model
    states = {"encoder": export.to_hub(model.student.encoder.named_parameters(), shapes.encoder.heads)}
    if everything:
        projection = model.student.context_projection.named_parameters(prefix="context_projection")
        states["predictor"] = export.to_hub(
            [*projection, *model.predictor.named_parameters()], shapes.predictor.heads
        )
        states["decoder"] = export.to_hub(model.decoder.named_parameters(), shapes.decoder.heads)
    for role, state in states.items():
        bad = [name for name, value in state.items() if not value.isfinite().all()]
        if bad:
            raise Mismatch(
                f"{role}: {len(bad)} tensors are missing in the checkpoint or not finite: {bad[:5]}"
            )
    return states


# The comparison ----------------------------------------------------------------------------------


def _difference(what: str, mine: Tensor, trained: Tensor) -> Difference:
    if mine.shape != trained.shape:
        raise Mismatch(f"{what}: shape {list(mine.shape)} instead of {list(trained.shape)}")
    return Difference(what, (mine - trained).abs().max().item(), trained.abs().max().item())


@torch.no_grad()
def compare(model: NextVid, folder: Path, video: Tensor, everything: bool) -> list[Difference]:
    """Run the training model and the networks loaded from `folder` on video [B, 3, T, H, W]."""
    from nextvid_mcore.masking import draw_masks
    from nextvid_mcore.models import sequences

    config, shapes, device = model.run, model.run.model, torch.device("cpu")
    clips, t = video.shape[0], shapes.token_frames(video.shape[2])
    encoder = load_encoder(folder)

    patches = sequences.patchify(video, shapes)  # [B, t*n, patch_dim]
    whole = sequences.full_sequence(shapes, t, clips, device)
    trained = model.student.encoder(patches.transpose(0, 1).contiguous(), whole).transpose(0, 1)
    rows = [_difference("encoder, whole clips", encoder(video), trained)]

    masks = draw_masks(config.mask, shapes.grid, t - 1, config.train.seed, range(clips))
    context = model.student.encoder(
        sequences.visible_patches(patches, masks), sequences.student_sequence(shapes, masks, device)
    )  # [s, rows, D]
    if everything:
        predictor, decoder = load_predictor(folder), load_decoder(folder)
        z = model.predictor(
            model.student.context_projection(context),
            sequences.predictor_sequence(shapes, masks, t, device),
        )  # [stretches * p * n, rows, E]
        z = z.unflatten(0, (len(masks.segments), -1))
    for i, segment in enumerate(masks.segments):
        chosen = (
            segment.clips if isinstance(segment.clips, slice) else slice(segment.clips, segment.clips + 1)
        )
        tokens, name = masks.of(segment), f"mask {segment.mask + 1}"
        mine = encoder(video[chosen], tokens)
        trained = context[segment.start : segment.stop].transpose(0, 1)
        rows.append(_difference(f"encoder, {name}", mine, trained))
        if not everything:
            continue
        my_z, my_align = predictor(mine, tokens, frames=range(1, t))
        rows.append(_difference(f"predictor z, {name}", my_z, z[i].transpose(0, 1)))
        align = model.predictor.align_head(z[i]).transpose(0, 1)
        rows.append(_difference(f"predictor align, {name}", my_align, align))

        generator = torch.Generator().manual_seed(i)
        tau = torch.rand(len(my_z), t - 1, generator=generator)
        noisy = torch.randn(*my_z.shape[:2], decoder.channels, generator=generator)

        def by_frame(x: Tensor) -> Tensor:
            """[B, p*n, ...] -> [n, B*p, ...], the training decoder's rows."""
            return x.unflatten(1, (t - 1, -1)).flatten(0, 1).transpose(0, 1).contiguous()

        velocity = model.decoder(by_frame(z[i].transpose(0, 1)), by_frame(noisy), tau.flatten())
        mine = by_frame(decoder(noisy, tau, my_z))
        rows.append(_difference(f"decoder velocity, {name}", mine, velocity))
    return rows


# The folder --------------------------------------------------------------------------------------


def check_out(out: Path, force: bool) -> None:
    """Refuse a folder that may not be replaced, before any work is done."""
    if not out.exists():
        return
    require(out.is_dir(), f"--out {out} is a file; name a folder")
    require(
        out.resolve() != Path.cwd(), f"--out {out} is replaced as a whole, and you stand in it; name another"
    )
    entries = {path.name for path in out.iterdir()}
    require(not entries or force, f"--out {out} is not empty; name another, or replace it with --force")
    for stray in sorted(entries - {"config.json", *FILES.values(), *hf.FILES}):
        raise ConfigError(f"--out {out} holds {stray}, which is no part of an export; name another folder")


@contextlib.contextmanager
def finished_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and vanishes otherwise."""
    out = out.resolve()  # where a link leads
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.unfinished-{os.getpid()}"
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    try:
        work.mkdir()
        yield work
        if out.exists():
            os.rename(out, old)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def last_rows(path: Path, step: int, weights: str) -> list[dict | None]:
    """The rows of metrics.jsonl and eval.jsonl (of these weights) at this step, of a checkpoint in a run."""
    from nextvid_mcore.training import metrics

    found: list[dict | None] = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = [row for row in metrics.read(path.absolute().parents[1] / name) if row["step"] == step]
        found.append(rows[-1] if rows else None)
    return [found[0], found[1] and found[1].get(weights)]


def convert(args: argparse.Namespace) -> None:
    """Do it all. Raises an error that `main` knows, and then leaves nothing behind."""
    out, for_hf = Path(args.out), args.format == "hf"
    require(not (for_hf and args.all), "--format hf exports the encoder alone; leave --all out")
    check_out(out, args.force)
    writable_folder(out.absolute().parent, "the folder of --out,")
    path = find_checkpoint(Path(args.run))
    with still_there(path):
        model, step = load_model(path, args.weights, args.all)
    print(f"{path}: step {step} of {model.run.recipe}, {args.weights} weights of the encoder")
    config = export.flat_config(model.run, flops.target_channels(model.run), step, args.weights)
    with finished_or_nothing(out) as folder:
        states = hub_states(model, args.all)
        if for_hf:  # what is compared is the same file of code and the same weights
            place = folder
            folder = place / "hub"
            folder.mkdir()
        export.write_folder(folder, config, states)
        video, source = compared_clips(model.run, args.clips)
        print(f"compared with the training model on {len(video)} clips of {video.shape[2]} frames; {source}")
        rows = compare(model, folder, video, args.all)
        for row in rows:
            note = "  (all zero: nothing compared)" if row.scale == 0 else ""
            print(
                f"  {row.what:26} largest difference {row.largest:.2e}, largest value {row.scale:.4g}{note}"
            )
        worst = max(rows, key=lambda row: (row.largest != row.largest, row.largest))
        if not worst.good(args.tolerance):
            raise Mismatch(
                f"{worst.what} differs by {worst.largest:.3g}, above the tolerance {args.tolerance:g}"
            )
        if for_hf:
            shutil.rmtree(folder)
            hf.write_folder(place, model.run, config, states["encoder"], *last_rows(path, step, args.weights))
    sizes = (
        f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in sorted(out.glob("*.safetensors"))
    )
    print(f"largest difference {worst.largest:.2e}, tolerance {args.tolerance:g}")
    print(f"wrote {out}: config.json, {', '.join(sizes)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Export a run to plain PyTorch, and compare the export with the training model."
    )
    parser.add_argument(
        "run", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--weights", choices=("ema", "online"), default="ema", help="of the encoder (default: ema)"
    )
    parser.add_argument("--all", action="store_true", help="predictor and decoder too")
    parser.add_argument(
        "--format", choices=("torch", "hf"), default="torch", help="hf: a folder for transformers' AutoModel"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument(
        "--clips", metavar="PATH", help="compare on this video, image, folder, list or manifest"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (default: 1e-4)")
    args = parser.parse_args(argv)
    from nextvid_mcore.pretrain import quiet

    quiet()
    from nextvid_mcore.training.manifest import CheckpointError

    try:
        convert(args)
    except Mismatch as error:
        print(f"convert_to_torch: {error}; nothing was written", file=sys.stderr)
        return 1
    except (ConfigError, HubError, CheckpointError, OSError) as error:  # a full disk too
        print(f"convert_to_torch: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
