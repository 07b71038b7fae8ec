"""Samples are pure functions of (seed, index); workers fail loudly and die with their parent."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import media
import numpy as np
import psutil
import pytest
import torch

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.data import decode
from nextvid_mcore.data.guard import DataError
from nextvid_mcore.data.loader import ClipBatch, ClipDataset, build_dataset, build_loader, iterate
from nextvid_mcore.data.manifest import Item

PATIENCE = 60.0  # seconds at the most; processes that end do so in a fraction of one
REQUESTS = [(8, (0, 1, 2)), (8, (9, 4)), (16, (3,)), (8, (5, 6)), (4, (20, 21, 22)), (8, (7, 8))]


@pytest.fixture
def media_items(tmp_path: Path) -> dict[str, list[Item]]:
    """Six videos of distinct lengths and four images, with labels."""
    videos = [
        Item(str(media.video(tmp_path / f"v{i}.avi", frames=20 + 4 * i, fps=8.0)), "video", i)
        for i in range(6)
    ]
    images = [Item(str(media.image(tmp_path / f"i{i}.png", 40 * i)), "image", 10 + i) for i in range(4)]
    return {"clips": videos, "pictures": images}


def configure(folder: Path, items: dict[str, list[Item]], **data: object) -> RunConfig:
    """tiny (64 pixels, 4 fps) on a manifest of these items."""
    config = recipes.get("tiny")
    path = str(media.manifest(folder / "manifest", **items))
    data = {"manifest": path, "eval_manifest": path, "workers": 0, **data}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def same(a: ClipBatch, b: ClipBatch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("video", "index", "label", "static"))
    return tensors and (a.items, a.bad, a.bad_samples) == (b.items, b.bad, b.bad_samples)


def workers() -> list[int]:
    """Loader processes of this one."""
    found = []
    for child in psutil.Process().children():
        if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
            found.append(child.pid)
    return found


def end(pids: list[int]) -> bool:
    """Whether all of them end. A loader tells a worker to, and on a busy machine that may take a while."""
    deadline = time.monotonic() + PATIENCE
    while any(running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def running(pid: int) -> bool:
    """False for a process that is gone, or dead and waits for a parent that doesn't ask."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_batches_are_what_was_asked_for(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    config = configure(tmp_path, media_items)
    batches = list(build_loader(config, REQUESTS))
    assert len(batches) == len(REQUESTS)
    by_path = {item.path: item for items in media_items.values() for item in items}
    kinds = set()
    for (frames, indices), batch in zip(REQUESTS, batches, strict=True):
        assert batch.video.shape == (len(indices), 3, frames, 64, 64) and batch.video.dtype == torch.uint8
        assert batch.index.tolist() == list(indices)
        for clip, path, label, static in zip(
            batch.video, batch.items, batch.label.tolist(), batch.static.tolist(), strict=True
        ):
            item = by_path[path]
            kinds.add(item.kind)
            assert label == item.label and static == (item.kind == "image")
            assert bool((clip == clip[:, :1]).all()) == static
    assert kinds == {"video", "image"}


def test_clips_have_the_wanted_rate_and_one_crop(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    """8 fps read at 4: every second frame, so grey levels rise by 2 steps a frame and then stay."""
    config = configure(tmp_path, {"clips": media_items["clips"]})
    starts = set()
    for batch in build_loader(config, [(8, tuple(range(12)))]):
        for clip, path in zip(batch.video, batch.items, strict=True):
            # a crop may hold the bright left half or not, the same in all frames
            levels = clip.float().mean((0, 2, 3))
            rises = (levels[1:] - levels[:-1]) / media.STEP
            assert rises.tolist() == pytest.approx([2.0] * 7, abs=0.15)
            starts.add((path, round(levels[0].item())))
    assert len(starts) > 8
    [batch] = build_loader(config, [(16, tuple(range(8)))])
    for clip, path in zip(batch.video, batch.items, strict=True):
        frames = 20 + 4 * int(Path(path).stem[1:])
        still = (clip[:, 1:] == clip[:, :-1]).all(0).all(-1).all(-1)
        shown = {min(2 * t, frames - 1) for t in range(16)}  # a shorter one is read from its start
        assert int(still.sum()) == 16 - len(shown)
        assert not still.any() or still.nonzero().min() == len(still) - still.sum()


def test_a_sample_is_pure_in_seed_and_index(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    config = configure(tmp_path, media_items)
    dataset = build_dataset(config)
    again = build_dataset(config)
    for index in (11, 3, 3, 0):
        one, two = dataset.sample(index, 8), again.sample(index, 8)
        assert torch.equal(one.video, two.video) and one.item == two.item
    [whole] = iterate(dataset, [(8, tuple(range(10)))])
    for index in (9, 2):
        assert torch.equal(whole.video[index], again.sample(index, 8).video)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    [differs] = iterate(build_dataset(other), [(8, tuple(range(10)))])
    assert differs.items != whole.items


def test_workers_change_nothing_but_the_process(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    """Order, changing frames and bad files are the same with 0 and 2 workers; global state stays."""
    media_items["clips"] += [Item(str(tmp_path / "gone.avi"), "video")]
    config = configure(tmp_path, media_items, workers=2)
    alone = list(iterate(build_dataset(config), REQUESTS))
    assert any(batch.bad for batch in alone)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    batches = build_loader(config, iter(REQUESTS))
    first = next(batches)
    pids = workers()
    assert len(pids) == 2
    assert all(same(a, b) for a, b in zip(alone, [first, *batches], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert end(pids), "a finished loader leaves no process"


def test_bad_files_are_redrawn_inside_their_set(
    tmp_path: Path, media_items: dict[str, list[Item]], caplog: pytest.LogCaptureFixture
) -> None:
    torn = media.truncated(tmp_path / "torn.avi", Path(media_items["clips"][0].path), 0.01)
    good = configure(tmp_path / "good", media_items)
    for place in (1, 4):
        media_items["clips"][place] = Item(str(torn), "video")
    broken = configure(tmp_path / "broken", media_items)
    with caplog.at_level(logging.WARNING, "nextvid.data"):
        [wanted], [got] = (build_loader(config, [(8, tuple(range(40)))]) for config in (good, broken))
        list(build_loader(broken, [(8, tuple(range(10)))]))  # as the held-out loss reads them again
    affected = [i for i in range(40) if wanted.items[i].endswith(("v1.avi", "v4.avi"))]
    assert len(affected) > 3 and got.bad_samples == len(affected) <= len(got.bad)
    for index in range(40):
        if index in affected:
            assert got.items[index].endswith(".avi") and got.items[index] != str(torn)
        else:
            assert got.items[index] == wanted.items[index]
            assert torch.equal(got.video[index], wanted.video[index])
    assert {path for path, _ in got.bad} == {str(torn)} and all(reason for _, reason in got.bad)
    assert sum(str(torn) in message for message in caplog.messages) == 1, "logged once"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_nothing_but_bad_files_stops_with_one_sentence(tmp_path: Path, workers: int) -> None:
    items = {"lost": [Item(str(tmp_path / f"{i}.mp4"), "video") for i in range(9)]}
    config = configure(tmp_path, items, workers=workers)
    with pytest.raises(
        DataError, match="files in a row of set lost can't be decoded, the last one .*mp4"
    ) as e:
        next(build_loader(config, [(8, (0,))]))
    assert "Traceback" not in str(e.value)


def test_clips_of_one_video_share_one_opening(
    tmp_path: Path, media_items: dict[str, list[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = decode.Video.__init__
    monkeypatch.setattr(decode.Video, "__init__", lambda self, path: opened.append(path) or real(self, path))
    config = configure(tmp_path, {"clips": media_items["clips"]}, clips_per_video=4)
    [batch] = build_loader(config, [(4, tuple(range(8)))])
    assert [batch.items[4 * i] for i in (0, 1)] == opened or len(set(batch.items)) == len(opened) == 1
    for group in (slice(0, 4), slice(4, 8)):
        assert len(set(batch.items[group])) == 1
        clips = batch.video[group]
        assert not any(torch.equal(clips[0], other) for other in clips[1:]), "own start and crop each"
    alone = build_dataset(config).sample(6, 4)
    assert torch.equal(alone.video, batch.video[6])


def test_evaluation_is_fixed(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    """No seed, no chance: the middle clip, its centre, unflipped, every item once."""
    config = configure(tmp_path, media_items, clips_per_video=4)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=9))
    [a], [b] = (iterate(build_dataset(c, train=False), [(4, tuple(range(10)))]) for c in (config, other))
    assert same(a, b) and len(set(a.items)) == 10
    for clip, path, static in zip(a.video, a.items, a.static.tolist(), strict=True):
        if static:
            continue
        frames = 20 + 4 * int(Path(path).stem[1:])
        start = (frames - 7) // 2
        numbers = media.frame_numbers(clip.permute(1, 2, 3, 0).numpy())
        assert numbers == [start, start + 2, start + 4, start + 6]
        left, right = clip[..., :24].float().mean(), clip[..., 40:].float().mean()
        assert left - right == pytest.approx(20, abs=2)


def test_static_clips_stay_one_frame_until_they_are_collated(
    tmp_path: Path, media_items: dict[str, list[Item]]
) -> None:
    sample = build_dataset(configure(tmp_path, {"p": media_items["pictures"]})).sample(0, 16)
    assert sample.video.shape == (3, 16, 64, 64) and sample.video.stride(1) == 0


def test_no_manifest_is_said() -> None:
    with pytest.raises(ConfigError, match="no data.manifest"):
        build_dataset(recipes.get("tiny"))


class Slow(ClipDataset):
    """Hangs in its second request, as a decoder can."""

    def __getitem__(self, request):  # noqa: ANN001, ANN204
        if request[1][0] > 0:
            time.sleep(600)
        return super().__getitem__(request)


def slow(config: RunConfig) -> Slow:
    dataset = build_dataset(config)
    return Slow(dataset.data, dataset.size, dataset.manifest, dataset.mixture, 0, True)


def test_a_worker_that_hangs_is_an_error(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    batches = iterate(slow(configure(tmp_path, media_items)), [(4, (1,))], workers=1, timeout=2)
    with pytest.raises(DataError, match="within 2 s.*data.timeout"):
        next(batches)  # on a busy machine the worker may not even have come to the file
    assert end(workers()), "closing the loader ends a worker that hangs"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere signals act as they always do")
def test_signals_to_the_whole_job_are_the_parents_to_answer(
    tmp_path: Path, media_items: dict[str, list[Item]]
) -> None:
    """Slurm and Ctrl-C signal every process: workers go on until they are closed."""
    requests = [(4, (index,)) for index in range(9)]
    batches = iterate(build_dataset(configure(tmp_path, media_items)), requests, workers=1)
    next(batches)
    [pid] = workers()
    for name in ("INT", "HUP", "TERM", "USR1"):
        subprocess.run(["/bin/sh", "-c", f"kill -s {name} {pid}"], check=True)  # not from its parent
    assert [batch.index.item() for batch in batches] == list(range(1, 9))
    assert end([pid])


def test_the_first_worker_of_a_process_is_shielded_too() -> None:
    """multiprocessing's own resource tracker, which the first one starts, unblocks SIGINT and SIGTERM."""
    look = (
        "import multiprocessing, signal\n"
        "from nextvid_mcore.data.workers import HELD, shield\n"
        "if __name__ == '__main__':\n"
        "    with shield():\n"
        "        process = multiprocessing.get_context('spawn').Process(target=print)\n"
        "        process.start()\n"
        "        assert HELD <= signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "    process.join()\n"
    )
    subprocess.run([sys.executable, "-c", look], check=True)


def test_a_worker_that_dies_is_an_error(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    batches = iterate(slow(configure(tmp_path, media_items)), [(4, (0,)), (4, (1,))], workers=1)
    next(batches)
    [pid] = workers()
    with pytest.raises((DataError, RuntimeError), match=f"worker.*{pid}"):
        os.kill(pid, signal.SIGKILL)
        next(batches)


PARENT = """
import sys
sys.path[:0] = {path!r}
import pickle, psutil
from test_data_loader import slow
from nextvid_mcore.data.loader import iterate

if __name__ == "__main__":
    config = pickle.load(open(sys.argv[1], "rb"))
    batches = iterate(slow(config), [(4, (0,)), (4, (1,)), (4, (2,))], workers=2)
    next(batches)
    print(*[c.pid for c in psutil.Process().children(recursive=True)], flush=True)
    next(batches)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_workers_die_with_their_parent_even_if_they_hang(
    tmp_path: Path, media_items: dict[str, list[Item]]
) -> None:
    import pickle

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(configure(tmp_path, media_items)))
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])]))
    command = [sys.executable, str(script), str(tmp_path / "config.pickle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) >= 2 and all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
    assert end(pids), "workers outlived their parent"


class Busy:
    """Gives an empty batch; a thread goes on inside torch, as the one does that hands batches over."""

    def __getitem__(self, request: tuple[int, tuple[int, ...]]) -> ClipBatch:
        threading.Thread(target=self.work, daemon=True).start()
        return ClipBatch(torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0), [])

    @staticmethod
    def work() -> None:
        square = torch.ones(500, 500)
        while True:
            square @ square


def test_a_closed_loader_ends_workers_in_the_midst_of_work_without_a_word(
    capfd: pytest.CaptureFixture,
) -> None:
    batches = iterate(Busy(), [(1, (i,)) for i in range(9)], workers=1)
    next(batches)
    pids = workers()
    batches.close()
    assert end(pids)
    assert capfd.readouterr().err == ""


def test_numpy_is_not_seeded_by_anyone(tmp_path: Path, media_items: dict[str, list[Item]]) -> None:
    """Global generators have no say in a sample."""
    dataset = build_dataset(configure(tmp_path, media_items))
    one = dataset.sample(2, 8).video
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(one, dataset.sample(2, 8).video)
