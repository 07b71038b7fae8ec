"""t-SNE of the encoder's features, as the paper's Figure 7, with their kNN accuracy in the title.

    python tools/tsne.py DIR --data PATH [--out tsne.png] [--items 500] [--frames T] [--perplexity 30]
    python tools/tsne.py DIR --data moving_digits --task digit|direction

DIR is a folder of tools/convert_to_torch.py. PATH: labelled clips or images: a manifest, a list ("path
label"), or a folder with one subfolder a class. A feature is the mean over a clip's tokens. The accuracy is
that of 20 nearest neighbours by cosine in the features themselves (not in the picture), each tenth of the
clips classified by the others. Moving digits are as large as the pretraining's (moving-digits:SIZE:SIDE: as
said). Needs scikit-learn; on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402

from nextvid_mcore import hub  # noqa: E402
from nextvid_mcore.config import ConfigError, require  # noqa: E402
from nextvid_mcore.data.digits_source import is_digits, side_of  # noqa: E402
from nextvid_mcore.data.guard import DataError  # noqa: E402
from nextvid_mcore.data.transforms import normalize  # noqa: E402
from nextvid_mcore.evaluation import clips, knn  # noqa: E402
from nextvid_mcore.evaluation.results import picture_file  # noqa: E402
from nextvid_mcore.rng import numpy_rng  # noqa: E402

FOLDS = 10
NAMED = 20  # classes of which a legend still helps


def folded_accuracy(features: Tensor, labels: Tensor, k: int = 20, folds: int = FOLDS) -> float:
    """Share of features [N, D] whose label [N] their k nearest neighbours in the other folds give."""
    order = torch.from_numpy(numpy_rng(0, "eval").permutation(len(labels)))
    classes, right = int(labels.max()) + 1, 0
    for fold in range(folds):
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[order[fold::folds]] = True
        guess = knn.classify(features[~test], labels[~test], features[test], classes, k)
        right += int((guess == labels[test]).sum())
    return right / len(labels)


def digit_features(  # noqa: ANN201
    encoder: torch.nn.Module, items: int, frames: int, size: int, side: int | None, task: str
):
    """Features [N, D], labels [N] and class names of moving digits."""
    from nextvid_mcore.data.digits_source import DigitClips
    from nextvid_mcore.data.moving_digits import DIRECTIONS, TASKS

    source, features, labels = DigitClips("test", size, side=side), [], []
    with torch.no_grad():
        for first in range(0, items, 16):
            video, label = source.clips(range(first, min(first + 16, items)), frames)
            features.append(encoder(normalize(video)).mean(1))
            labels.append(label[:, list(TASKS).index(task)])
    names = DIRECTIONS if task == "direction" else tuple(str(digit) for digit in range(TASKS[task]))
    return torch.cat(features), torch.cat(labels), names


def embed(features: Tensor, perplexity: float) -> np.ndarray:
    """[N, D] -> [N, 2], of L2-normalised features, the same each time."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ConfigError(f"t-SNE needs scikit-learn ({error}): pip install scikit-learn") from None
    require(
        0 < perplexity < len(features),
        f"--perplexity {perplexity:g} must be below the number of clips, {len(features)}",
    )
    method = TSNE(perplexity=perplexity, init="pca", random_state=0, metric="cosine")
    return method.fit_transform(torch.nn.functional.normalize(features, dim=-1).numpy())


def figure(points: np.ndarray, labels: Sequence[int], names: Sequence[str], title: str) -> Figure:
    """The scatter plot; a legend where there are few classes."""
    labels = np.asarray(labels)
    present = np.unique(labels)
    legend = len(present) <= NAMED
    out = Figure(figsize=(7.4 if legend else 6, 6), dpi=120, layout="constrained")
    ax = out.subplots()
    table = colormaps["tab10" if len(present) <= 10 else "tab20" if legend else "gist_rainbow"]
    area = max(10, min(40, 6000 / len(labels)))
    for rank, label in enumerate(present):
        colour = table(rank) if legend else table(rank / max(1, len(present) - 1))
        name = names[label] if label < len(names) else str(label)
        ax.scatter(*points[labels == label].T, s=area, color=colour, alpha=0.85, linewidths=0, label=name)
    ax.set_title(title, fontsize=11)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_color("#cccccc")
    if legend:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, markerscale=1.2)
    return out


def run(args: argparse.Namespace) -> str:
    """Extract, measure and draw; the line to print."""
    require(args.items >= 2, f"--items must be 2 or more, got {args.items}")
    config, encoder = hub.load_config(args.folder), hub.load_encoder(args.folder)
    frames, size = config["frames"] if args.frames is None else args.frames, config["image_size"]
    clips.check_shape(encoder, frames, size, args.fps)
    require(args.perplexity > 0, f"--perplexity must be positive, got {args.perplexity:g}")
    picture_file(args.out)
    if is_digits(args.data):
        side = side_of(args.data, size, config["clips"])
        features, labels, names = digit_features(encoder, args.items, frames, size, side, args.task)
        what = f"moving digits, by {args.task}"
    else:
        items = clips.find(args.data, args.items)
        features, labels = clips.pooled(encoder, clips.read_all(items, frames, size, args.fps))
        known = labels >= 0
        require(bool(known.any()), f"{args.data} has no labels; give class folders or a list with labels")
        features, labels, names = features[known], labels[known], items.classes
        what = Path(args.data).name
    classes = len(labels.unique())
    require(classes >= 2, f"{what}: only {classes} class; t-SNE of one class shows nothing")
    require(
        classes < len(labels), f"{what}: {classes} clips of as many classes have no neighbour of their own"
    )
    accuracy = folded_accuracy(features, labels)
    perplexity = min(args.perplexity, (len(features) - 1) / 3)
    points = embed(features, perplexity)
    chance = torch.bincount(labels).max().item() / len(labels)
    title = f"{what}: kNN accuracy {accuracy:.1%} (most frequent class {chance:.1%})\n"
    title += f"{len(labels)} clips of {classes} classes, {config['recipe']} step {config['step']}"
    figure(points, labels.tolist(), names, title).savefig(args.out)
    return f"{title.replace(chr(10), ', ')}\nwrote {args.out}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of tools/convert_to_torch.py")
    parser.add_argument("--data", required=True, help="labelled clips, or moving_digits")
    parser.add_argument("--task", choices=("digit", "direction"), default="digit", help="of moving_digits")
    parser.add_argument("--out", type=Path, default=Path("tsne.png"), help="the picture")
    parser.add_argument("--items", type=int, default=500, help="clips at most")
    parser.add_argument("--frames", type=int, help="of a clip (default: the pretraining's)")
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second of a video's clip")
    parser.add_argument("--perplexity", type=float, default=30.0, help="at most a third of the clips")
    args = parser.parse_args()
    try:
        print(run(args))
    except (ConfigError, DataError, hub.HubError, OSError) as error:
        print(f"tsne: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
