"""Labelled clips for the online kNN: which ones, their labels, who is a neighbour and who is asked.

Of a manifest the first clips in held-out order, spread evenly over its sets: two of three are neighbours.
Its sets keep their own labels: class 3 of one set is not class 3 of another, so each is a task of its own.
Moving digits have two labels; the neighbours are clips of MNIST's training digits, asked are test digits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextvid_mcore.config import RunConfig, require
from nextvid_mcore.data.loader import ClipBatch, ClipDataset, build_dataset

SEED = 1  # of the neighbours among moving digits: not the clips that a run of seed 0 trains on
ADVICE = "give its sets labels (tools/build_manifest.py), or leave --eval.knn-every out"


@dataclass(frozen=True)
class LabelledClips(Dataset):
    """Clips 0 .. N-1; the loader asks for (frames, numbers)."""

    parts: tuple[Any, ...]  # what the clips are read from
    places: tuple[tuple[int, int], ...]  # of each clip: its part and its index there
    tasks: tuple[str, ...]
    labels: Tensor  # int64 [N, tasks], -1: the task isn't this clip's
    asked: Tensor  # bool [N]: is classified; the others are neighbours

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, request: tuple[int, Sequence[int]]) -> Any:
        """A `ClipBatch` whose `index` are the numbers, or the loader's failure. Label -1: leave this clip
        out, a file of its batch was bad and another may stand twice."""
        frames, numbers = request
        found = []
        for part, run in groupby((self.places[number] for number in numbers), key=lambda place: place[0]):
            batch = self.parts[part][frames, [index for _, index in run]]
            if not isinstance(batch, ClipBatch):
                return batch
            found.append(batch)
        return ClipBatch(
            video=torch.cat([batch.video for batch in found]),
            index=torch.tensor(list(numbers), dtype=torch.int64),
            label=torch.cat(
                [torch.full_like(batch.label, -1 if batch.bad_samples else 0) for batch in found]
            ),
            static=torch.cat([batch.static for batch in found]),
            items=[item for batch in found for item in batch.items],
            bad=[bad for batch in found for bad in batch.bad],
            bad_samples=sum(batch.bad_samples for batch in found),
        )


def build_labelled(config: RunConfig) -> LabelledClips:
    """The clips of `eval.knn_samples`, from the validation manifest.

    Raises:
        ConfigError: there are no labels, or too few to vote.
    """
    require(
        config.data.eval_manifest is not None,
        f"--eval.knn-every {config.eval.knn_every} needs labelled clips: name their --data.eval-manifest",
    )
    plain = dataclasses.replace(config.data, decoder="decord")  # read once: not worth a GPU
    dataset = build_dataset(dataclasses.replace(config, data=plain), train=False)
    clips = (_of_manifest if isinstance(dataset, ClipDataset) else _of_digits)(dataset, config)
    for task, label in zip(clips.tasks, clips.labels.T, strict=True):
        known, wanted = label[(label >= 0) & ~clips.asked], label[(label >= 0) & clips.asked]
        require(
            len(known.unique()) > 1 and len(wanted) > 0,
            f"online kNN: of the {config.eval.knn_samples} clips of {config.data.eval_manifest} looked at, "
            f"{task} has {len(known)} neighbours of {len(known.unique())} classes and {len(wanted)} to ask; "
            "two classes and one clip to ask are the least: raise --eval.knn-samples",
        )
        require(
            bool(torch.isin(wanted, known).any()),
            f"online kNN: of the {config.eval.knn_samples} clips of {config.data.eval_manifest} looked at, "
            f"none of {task}'s {len(wanted)} to ask has a neighbour of its class, so none can be right: "
            "raise --eval.knn-samples, or hold more clips of every class out",
        )
    return clips


def _of_manifest(dataset: ClipDataset, config: RunConfig) -> LabelledClips:
    """Those with a label among the first clips in held-out order, each file once."""
    mixture, manifest = dataset.mixture, dataset.manifest
    found: dict[str, tuple[str, int, int]] = {}  # path -> (set, held-out index, label)
    for index in range(min(config.eval.knn_samples, sum(mixture.rows))):
        name, row = mixture.held_out(index)
        item = manifest.item(name, row)
        if item.label >= 0:
            found.setdefault(item.path, (name, index, item.label))
    require(
        len(found) > 0,
        f"online kNN: {manifest.path} has no labels among the {config.eval.knn_samples} clips looked at; "
        + ADVICE,
    )
    tasks = tuple(name for name in mixture.names if any(place[0] == name for place in found.values()))
    labels = torch.full((len(found), len(tasks)), -1)
    seen = dict.fromkeys(tasks, 0)
    asked = torch.zeros(len(found), dtype=torch.bool)
    for number, (name, _, label) in enumerate(found.values()):
        labels[number, tasks.index(name)] = label
        asked[number] = seen[name] % 3 == 2
        seen[name] += 1
    places = tuple((0, index) for _, index, _ in found.values())
    return LabelledClips((dataset,), places, tasks, labels, asked)


def _of_digits(dataset: Any, config: RunConfig) -> LabelledClips:
    from nextvid_mcore.data.moving_digits import TASKS, load_mnist

    neighbours = config.eval.knn_samples * 2 // 3
    counts = (neighbours, config.eval.knn_samples - neighbours)
    other = copy.copy(dataset)
    other.split, other.seed, other._digits = "train", SEED, None
    parts = (other, dataset)
    labels = []
    for part, count in zip(parts, counts, strict=True):
        motion = part.motion(range(count))
        digit = load_mnist()[part.split][1][torch.from_numpy(motion.item)]
        labels.append(torch.stack([digit.long(), torch.from_numpy(motion.direction)], dim=1))
    places = [(part, index) for part, count in enumerate(counts) for index in range(count)]
    asked = torch.tensor([part == 1 for part, _ in places])
    return LabelledClips(parts, tuple(places), tuple(TASKS), torch.cat(labels), asked)
