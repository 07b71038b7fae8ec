"""V-JEPA 2's own training loop, from a checkout the user names, on clips that lie on the device.

Source: github.com/facebookresearch/vjepa2, app/vjepa/train.py. Its `main` runs as it is: its models, mask
collator, DDP, autocast, loss, GradScaler, AdamW with its groups, its schedules and its EMA. Only what
feeds it is ours: `app.vjepa.transforms` and `src.datasets.data_manager`, which read and augment files (and
need OpenCV and decord for it), are replaced by modules of this file whose loader hands out the same clips
again and again, with masks drawn by its collator. A step is what lies between two requests for a batch;
it ends with the loss's copy to the host, as theirs does.

Its option `compile_model` compiles encoder, target and predictor, each as a whole. torch 2.11 can't trace the
context `torch.backends.cuda.sdp_kernel()` round their attention, and what it can't trace inside activation
checkpointing it runs eagerly: all blocks. So there is a third way, `blocks`: that context, which without
arguments allows every kernel as is usual, is replaced by one that does nothing, and each block is compiled,
which takes seconds where the whole of both masks' passes in one graph takes minutes.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import importlib
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from common import Measured

from nextvid_mcore.config import ConfigError, require

TRAIN = "app.vjepa.train"
NEEDED = [
    "app/vjepa/train.py",
    "app/vjepa/utils.py",
    "src/models/vision_transformer.py",
    "src/models/predictor.py",
    "src/masks/multiseq_multiblock3d.py",
]
FED_BY_US = ("app.vjepa.transforms", "src.datasets.data_manager")
FETCH = "git clone https://github.com/facebookresearch/vjepa2"
WAYS = ("eager", "compiled", "blocks")


class Finished(BaseException):
    """Enough steps. Not an Exception: their loop would take that for a broken file and try again."""


class Loader:
    """Stands for their data loader, and holds the stopwatch."""

    def __init__(self, batches: list[Any], steps: int, warmup: int) -> None:
        self.batches, self.steps, self.warmup = batches, steps, warmup
        self.times: list[float] = []  # of the timed steps' starts, and the last one's end

    def __len__(self) -> int:
        return self.steps + self.warmup + 1

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            if i >= self.warmup:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())
            if i == len(self) - 1:
                raise Finished
            yield self.batches[i % len(self.batches)]

    def set_epoch(self, epoch: int) -> None:
        """Part of a sampler; the clips are always the same."""


def check_checkout(path: Path) -> Path:
    """The checkout's absolute path. Raises ConfigError if it isn't one of V-JEPA 2."""
    missing = [name for name in NEEDED if not (path / name).is_file()]
    require(
        not missing,
        f"--checkout {path} is not a checkout of V-JEPA 2: it has no {', '.join(missing)}; {FETCH}",
    )
    return path.resolve()


def read_settings(checkout: Path, name: str) -> dict[str, Any]:
    """One of its training configurations, for instance configs/train/vitg16/pretrain-256px-16f.yaml."""
    path = checkout / name
    require(path.is_file(), f"--config {name}: no such file in the checkout {checkout}")
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("reading V-JEPA 2's configurations needs PyYAML: pip install pyyaml") from error
    return yaml.safe_load(path.read_text())


def frames_and_size(settings: dict[str, Any]) -> tuple[int, int]:
    """Frames of a clip and pixels of its side."""
    return max(settings["data"]["dataset_fpcs"]), settings["data"]["crop_size"]


@contextlib.contextmanager
def imported(checkout: Path, loader: dict[str, Any]) -> Iterator[ModuleType]:
    """Its training module, fed by `loader["make"]`; the path and the modules are ours again afterwards."""

    def init_data(*, batch_size: int, collator: Any, **settings: Any) -> tuple[Loader, Loader]:
        made = loader["made"] = loader["make"](batch_size, collator)
        return made, made

    transforms, data = (ModuleType(name) for name in FED_BY_US)
    transforms.make_transforms = lambda **settings: None
    data.init_data = init_data
    sys.path.insert(0, str(checkout))
    try:
        sys.modules |= dict(zip(FED_BY_US, (transforms, data), strict=True))
        try:
            module = importlib.import_module(TRAIN)
        except ImportError as error:
            raise ConfigError(
                f"V-JEPA 2's code in {checkout} can't be imported ({error}); it needs torch, numpy, timm, "
                "einops and PyYAML"
            ) from error
        file = Path(module.__file__).resolve()
        require(
            file == checkout / "app/vjepa/train.py",
            f"another package called `app` is installed and was imported instead of the checkout's: {file}",
        )
        logging.getLogger().setLevel(logging.WARNING)  # it prints whole networks
        yield module
    finally:
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n.split(".")[0] in ("app", "src")]:
            del sys.modules[name]


def compile_blocks(wrapper: torch.nn.Module) -> None:
    """In place of `wrapper.compile()`."""
    blocks = [module for module in wrapper.modules() if type(module).__name__ == "Block"]
    require(blocks, f"{type(wrapper).__name__} has no modules called Block, which could be compiled")
    for block in blocks:
        block.compile()


@contextlib.contextmanager
def compiler(way: str) -> Iterator[None]:
    """torch's compiler as it comes, whatever ours is set to (models/inductor.py); what `blocks` replaces.

    Their modules must have been imported.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    with contextlib.ExitStack() as stack:
        stack.enter_context(inductor.patch(inductor_choices_class=None))
        stack.enter_context(functorch.patch(guess_tangent_strides_as_outputs=False))
        stack.enter_context(V.set_choices_handler(InductorChoices()))
        if way == "blocks":
            wrappers = sys.modules["src.utils.wrappers"]
            for name in ("MultiSeqWrapper", "PredictorMultiSeqWrapper"):
                stack.enter_context(mock.patch.object(getattr(wrappers, name), "compile", compile_blocks))
            anything = mock.patch.object(torch.backends.cuda, "sdp_kernel", contextlib.nullcontext)
            stack.enter_context(anything)
        yield


def measure(
    checkout: Path,
    settings: dict[str, Any],
    batch: int,
    steps: int,
    warmup: int,
    way: str = "eager",
    masks: int = 4,
) -> Measured:
    """Time `steps` of its steps at `batch` clips, after `warmup` ones. Needs an initialised process group.

    way: of WAYS. masks: so many batches of masks are drawn, and taken in turn.
    """
    require(steps > 0 and masks > 0, f"steps and masks must be positive, got {steps} and {masks}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, size = frames_and_size(settings)

    def make(batch_size: int, collator: Any) -> Loader:
        # its samples are (clips, label, frame indices)
        samples = [([torch.empty(0)], 0, [torch.arange(frames)]) for _ in range(batch_size)]
        clips = torch.randn(batch_size, 3, frames, size, size, device=device)
        batches = []
        for _ in range(masks):
            ((_, label, indices), enc, pred), *_ = collator(samples)
            on_device = ([m.to(device) for m in side] for side in (enc, pred))
            batches.append([([[clips], label, indices], *on_device)])
        return Loader(batches, steps, warmup)

    with tempfile.TemporaryDirectory() as folder:
        mine = copy.deepcopy(settings)
        mine["folder"] = folder
        mine["meta"] |= {"load_checkpoint": False, "read_checkpoint": None}
        mine["model"]["compile_model"] = way != "eager"
        mine["data"]["batch_size"] = batch
        mine["optimization"]["ipe"] = steps + warmup + 1
        feed: dict[str, Any] = {"make": make}
        with imported(checkout, feed) as module, compiler(way):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                module.main(mine)
            except Finished:
                pass
            gib = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else math.nan
        with open(Path(folder) / "log_r0.csv") as log:
            loss = float(list(csv.DictReader(log))[-1]["loss"])
    times = feed["made"].times
    return Measured((times[-1] - times[0]) / steps, gib, loss)


def free() -> None:
    """Give back what a measurement held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
