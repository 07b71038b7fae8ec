"""What the target's encoder waits for, and what waits for it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from unit.fake_streams import FakeCuda, FakeStream, Made

from nextvid_mcore.data import ClipBatch
from nextvid_mcore.targets.lanes import Lanes
from nextvid_mcore.training import feed, microbatch
from nextvid_mcore.training.ahead import Ahead
from nextvid_mcore.training.engine import Engine

CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize(
    ("early", "known", "behind"),
    [
        (True, True, {"weights", "clips"}),
        (True, False, {"weights", "clips", "update"}),
        (False, True, {"weights", "clips", "update"}),
    ],
)
def test_early_work_waits_for_what_it_reads_alone_and_its_reader_for_it(cuda, early, known, behind):
    cuda.launch("weights")
    ahead, made = Ahead(CUDA), Made()
    ahead.early = early
    side = FakeStream()
    with torch.cuda.stream(side):
        cuda.launch("clips")
    arrived = side.record_event()
    cuda.current.wait_stream(side)
    cuda.launch("update")

    def work() -> Made:
        cuda.launch("latents")
        return made

    result = ahead.start(work, (arrived,) if known else None)
    cuda.launch("something else")
    assert result() is made
    cuda.launch("replay")
    assert cuda.behind["latents"] == behind
    assert "latents" not in cuda.behind["something else"] and "latents" in cuda.behind["replay"]
    assert made.users == [cuda.current]  # so that its memory is not given away before the replay has read it


def engine(cuda: FakeCuda, asked: list, **more: object) -> SimpleNamespace:
    """As much of an engine as hands out latents."""
    ahead = Ahead(CUDA)
    start = ahead.start
    ahead.start = lambda work, after: asked.append(after) or start(work, after)
    found = SimpleNamespace(
        ahead=ahead,
        model=SimpleNamespace(holds={"decoder"}, children=lambda: iter(())),
        share=lambda clip: clip,
        target=None,
        device=CUDA,
        **more,
    )
    found.latents = lambda clip: Engine.latents(found, clip)
    return found


def test_clips_on_the_host_are_there_and_those_on_a_gpu_when_their_event_says_so(cuda):
    asked: list = []
    here = engine(cuda, asked)
    event = cuda.current.record_event()
    for on_gpu, arrived in ((False, None), (True, event), (True, None)):
        clip = SimpleNamespace(video=SimpleNamespace(is_cuda=on_gpu), arrived=arrived)
        here.ahead.stream = None  # only what is asked for
        here.latents(clip)
    assert asked == [(), (event,), None]


@pytest.mark.parametrize("all_first", [False, True])
def test_a_recorded_pass_waits_for_its_latents_or_for_all_of_the_step(cuda, monkeypatch, all_first):
    def latents(clip: SimpleNamespace, target: object, device: object) -> Made:
        cuda.launch(f"latents {clip.number}")
        return Made()

    monkeypatch.setattr(microbatch, "predicted_latents", latents)
    graphs = SimpleNamespace(run=lambda clip, *rest, **more: cuda.launch(f"pass {clip.number}"))
    here = engine(cuda, [], graphs=graphs, all_first=all_first)
    here.ahead.early = True
    point = SimpleNamespace(stage=SimpleNamespace(tau_samples=1))
    clip = SimpleNamespace(video=SimpleNamespace(is_cuda=False), arrived=None)
    for step in range(2):
        clips = [SimpleNamespace(**vars(clip), number=f"{step}.{i}") for i in range(3)]
        Engine.gradients(here, point, clips, None)
        cuda.launch(f"update {step}")
    for i in range(3):  # of the second step
        seen = cuda.behind[f"pass 1.{i}"]
        there = {f"latents 1.{n}" for n in range(3 if all_first else i + 1)}
        assert there == {x for x in seen if x.startswith("latents 1")} and "update 0" in seen
        assert not any(x.startswith(("pass", "update")) for x in cuda.behind[f"latents 1.{i}"])


def test_the_feed_says_when_clips_that_it_shared_have_arrived(cuda, monkeypatch):
    cuda.launch("update")

    def share(batch: ClipBatch, *rest: object) -> ClipBatch:
        cuda.launch(f"clips {int(batch.index)}")
        video = Made()
        video.is_cuda = True
        return dataclasses.replace(batch, video=video)

    monkeypatch.setattr(feed, "share", share)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    one = torch.zeros(1, dtype=torch.int64)
    made = feed.Feed.__new__(feed.Feed)
    made._loader = iter(ClipBatch(torch.zeros(1), one + i, one, one.bool(), [""]) for i in range(2))
    made._groups = SimpleNamespace(layout=SimpleNamespace(data=1))
    made._guard = SimpleNamespace(update=lambda *counts: None)
    layout = SimpleNamespace(micro_batches=lambda batch, micro: 2)
    made._placement = SimpleNamespace(encoder=SimpleNamespace(layout=layout), clips=lambda seat, micro: 1)
    made._seat, made._size, made._stream = None, 8, FakeStream()
    made._shared = made._counts = True
    point = SimpleNamespace(batch=2, micro_batch=1, stage=SimpleNamespace(frames=4))
    for batch in made.next(point, 0).batches:
        assert batch.arrived.seen == {"clips 0", "clips 1"} and batch.video.users == [cuda.current]


def test_a_lane_keeps_its_order_and_two_of_them_keep_none(cuda):
    lanes = Lanes(CUDA, count=2, at_most=2)
    results = []

    def chunk(number: int):
        def work(lane) -> tuple[Made, ...]:
            cuda.launch(f"frames {number}")
            with lane.moves():
                cuda.launch(f"norm {number}")
            cuda.launch(f"product {number}")
            results.append(Made())
            return (results[-1],)

        return work

    cuda.launch("video")
    found = lanes.run([chunk(i) for i in range(3)])
    cuda.launch("join")
    assert found == [(each,) for each in results] and all(m.users == [cuda.current] for m in results)
    one = ["video", "frames 0", "norm 0", "product 0", "frames 2", "norm 2", "product 2"]
    for i, name in enumerate(one):
        assert cuda.behind[name] == set(one[:i])
    assert cuda.behind["product 1"] == {"video", "frames 1", "norm 1"}
    assert cuda.behind["join"] == {*one, "frames 1", "norm 1", "product 1"}
    assert [cuda.streams[name].priority for name in ("norm 0", "product 0", "norm 1")] == [-1, 0, -1]
    lanes.run([chunk(3)])
    assert "join" in cuda.behind["frames 3"]  # what was read there is free again
