"""tools/build_manifest.py: listing, labels, probing, resuming, what is bad, the held-out share."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import media
import pytest

from nextvid_mcore.config import ConfigError
from nextvid_mcore.data import build as module
from nextvid_mcore.data.build import Build, Pool, probe_chunk
from nextvid_mcore.data.manifest import Item, Manifest
from nextvid_mcore.data.sources import Source, kind_of

ROOT = Path(__file__).parents[2]


def run(build: Build, *sets: str) -> list[module.Report]:
    return build.run([Source.parse(text) for text in sets], lambda *_: None)


def items(folder: Path, name: str) -> list[Item]:
    manifest = Manifest.open(folder)
    return [manifest.item(name, i) for i in range(manifest.sets[name].rows)]


def cut_after(monkeypatch: pytest.MonkeyPatch, *stems: str) -> None:
    """Chunks end after these files, and where the real hash of a name says so no more."""

    def crc32(path: bytes) -> int:
        return 0 if Path(os.fsdecode(path)).stem in stems else 1

    monkeypatch.setattr(module, "zlib", SimpleNamespace(crc32=crc32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with a space in one name, a file beside them, and things that are no media."""
    root = tmp_path / "some data"
    media.video(root / "cat food" / "x 1.avi", frames=12, fps=6.0)
    media.video(root / "dog" / "deep" / "y.avi", frames=20, fps=10.0)
    media.image(root / "dog" / "z.png")
    media.image(root / "top.JPG")
    (root / "dog" / "notes.txt").write_text("none of ours")
    (root / ".hidden").mkdir()
    media.image(root / ".hidden" / "h.png")
    return root


def test_a_folder_with_labels(tmp_path: Path, folder: Path) -> None:
    [report] = run(Build(tmp_path / "m"), f"all={folder}")
    assert dict(report.kinds) == {"video": 2, "image": 2} and not report.rejected
    assert items(tmp_path / "m", "all") == [
        Item(str(folder / "top.JPG"), "image", -1),
        Item(str(folder / "cat food/x 1.avi"), "video", 0),
        Item(str(folder / "dog/z.png"), "image", 1),
        Item(str(folder / "dog/deep/y.avi"), "video", 1),
    ]
    assert Manifest.open(tmp_path / "m").sets["all"].classes == ("cat food", "dog")


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path, folder: Path) -> None:
    media.image(tmp_path / "elsewhere" / "e.png")
    (folder / "linked").symlink_to("../elsewhere")
    for place, target in (("again", "."), ("dog/up", "../.."), ("dog/deep/cat", "../../cat food")):
        (folder / place).symlink_to(target)
    (folder / "cat food" / "dog").symlink_to("../dog")  # with dog/deep/cat a circle of two
    run(Build(tmp_path / "m"), f"all={folder}")
    found = [str(Path(item.path).relative_to(folder)) for item in items(tmp_path / "m", "all")]
    assert found == [
        *("top.JPG", "cat food/x 1.avi", "cat food/dog/z.png", "cat food/dog/deep/y.avi"),
        *("dog/z.png", "dog/deep/y.avi", "dog/deep/cat/x 1.avi", "linked/e.png"),
    ]
    assert Manifest.open(tmp_path / "m").sets["all"].classes == ("cat food", "dog", "linked")


def test_a_kind_takes_only_its_files_and_probing_fills_the_row(tmp_path: Path, folder: Path) -> None:
    reports = run(Build(tmp_path / "m", probe=True), f"v={folder}:video", f"i={folder}:image")
    assert [dict(report.kinds) for report in reports] == [{"video": 2}, {"image": 2}]
    assert [(i.frames, i.fps, i.label) for i in items(tmp_path / "m", "v")] == [(12, 6.0, 0), (20, 10.0, 1)]
    assert [(i.frames, i.fps, i.label) for i in items(tmp_path / "m", "i")] == [(1, 0.0, -1), (1, 0.0, 1)]
    assert reports[0].seconds == pytest.approx(12 / 6 + 20 / 10)


LIST = """/data/a.mp4 3
/data/with space/b c.mp4 12

"/data/quoted one.webm" 4
rel/d.avi 5
/data/e.mp4::6
/data/f 9.jpg,7
/data/g.mp4\t8
/data/no label 2.mp4
"""


def test_a_list_as_v_jepa_writes_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(LIST)
    run(Build(tmp_path / "m"), f"s={tmp_path / 'list.csv'}")
    assert items(tmp_path / "m", "s") == [
        Item("/data/a.mp4", "video", 3),
        Item("/data/with space/b c.mp4", "video", 12),
        Item("/data/quoted one.webm", "video", 4),
        Item(str(tmp_path / "rel/d.avi"), "video", 5),
        Item("/data/e.mp4", "video", 6),
        Item("/data/f 9.jpg", "image", 7),
        Item("/data/g.mp4", "video", 8),
        Item("/data/no label 2.mp4", "video", -1),
    ]


def test_what_is_bad_is_left_out_listed_and_counted(tmp_path: Path) -> None:
    good = media.video(tmp_path / "good.avi", frames=12)
    media.video(tmp_path / "short.avi", frames=3)
    media.truncated(tmp_path / "torn.avi", good, 0.01)
    (tmp_path / "list.csv").write_text("good.avi 0\nshort.avi 0\ntorn.avi 0\ngone.avi 0\nodd.xyz 0\n")
    [report] = run(Build(tmp_path / "m", probe=True, min_frames=8), f"s={tmp_path / 'list.csv'}")
    assert [item.path for item in items(tmp_path / "m", "s")] == [str(good)]
    assert dict(report.rejected) == {"short": 1, "unreadable": 2, "unknown": 1}
    lines = (tmp_path / "m/rejected.tsv").read_text().splitlines()
    table = {Path(path).name: (what, reason) for _, what, reason, path in (x.split("\t") for x in lines[1:])}
    assert table["short.avi"] == ("short", "3 frames, fewer than 8")
    assert table["gone.avi"][0] == "unreadable" and "No such file" in table["gone.avi"][1]
    assert table["torn.avi"][0] == "unreadable" and table["odd.xyz"][0] == "unknown"


def test_a_second_run_keeps_what_was_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the chunk of a new file, and files that were bad, are opened again."""
    monkeypatch.setattr(module, "Pool", Here)
    cut_after(monkeypatch, *(f"{number:03d}" for number in range(4, 40, 5)))
    videos = tmp_path / "v"
    source = media.video(tmp_path / "a.avi", frames=4)
    videos.mkdir()
    for number in range(40):
        os.link(source, videos / f"{number:03d}.avi")
    (videos / "bad.avi").write_text("torn")
    opened: list[str] = []
    real = module.decode.probe
    monkeypatch.setattr(module.decode, "probe", lambda p, k: opened.append(Path(p).name) or real(p, k))
    build = Build(tmp_path / "m", probe=True)
    run(build, f"s={videos}")
    first = items(tmp_path / "m", "s")
    assert len(opened) == 41 and len(first) == 40
    assert len(list((tmp_path / "m/.probed/s").iterdir())) == 9  # eight of five files, and bad.avi
    opened.clear()
    run(build, f"s={videos}")
    assert opened == ["bad.avi"] and items(tmp_path / "m", "s") == first
    os.remove(videos / "bad.avi")  # repaired under the same name
    os.link(source, videos / "bad.avi")
    os.link(source, videos / "0205.avi")
    opened.clear()
    run(build, f"s={videos}")
    assert sorted(opened) == [*(f"{n}.avi" for n in ("020", "0205", "021", "022", "023", "024")), "bad.avi"]
    assert len(items(tmp_path / "m", "s")) == 42


class Here(Pool):
    """Works in this process, so that a test can count."""

    @staticmethod
    def _start(jobs: int):  # noqa: ANN205
        return None

    def submit(self, job):  # noqa: ANN001, ANN201
        return self.work(*job)

    def result(self, handle):  # noqa: ANN001, ANN201
        return handle

    def close(self) -> None:
        pass


def crash(part: str, files: list[tuple[str, str | None]]) -> list[module.Probed]:
    """A decoder that takes its process down at one file."""
    if any(path.endswith("crash.avi") for path, _ in files):
        os.abort()
    return probe_chunk(part, files)


@pytest.mark.parametrize("ends", [("a", "b", "crash"), ()])  # a file a chunk, or all in one
def test_a_crash_of_the_decoder_costs_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: tuple[str, ...]
) -> None:
    cut_after(monkeypatch, *ends)
    monkeypatch.setattr(module, "Pool", functools.partial(Pool, work=crash))
    for name in ("a", "b", "crash", "d"):
        media.video(tmp_path / f"v/{name}.avi", frames=4)
    [report] = run(Build(tmp_path / "m", probe=True, jobs=1), f"s={tmp_path / 'v'}")
    assert [Path(item.path).stem for item in items(tmp_path / "m", "s")] == ["a", "b", "d"]
    assert dict(report.rejected) == {"unreadable": 1}
    assert "the decoder crashed" in (tmp_path / "m/rejected.tsv").read_text()


def test_the_held_out_share_belongs_to_the_path(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("".join(f"/d/{i}.mp4 0\n" for i in range(600)))
    more = "".join(f"/d/new{i}.mp4 0\n" for i in range(50))
    build = Build(tmp_path / "m", holdout=0.2)
    run(build, f"s={tmp_path / 'list.csv'}")
    train, held = (
        {item.path for item in items(where, "s")} for where in (tmp_path / "m", tmp_path / "m-val")
    )
    assert not train & held and len(train | held) == 600
    assert 80 < len(held) < 160  # 120 expected, deviation 9.8
    with open(tmp_path / "list.csv", "a") as file:
        file.write(more)
    run(build, f"s={tmp_path / 'list.csv'}")
    again = {item.path for item in items(tmp_path / "m-val", "s")}
    assert {path for path in again if "new" not in path} == held


def test_what_was_held_out_before_and_is_not_now_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("".join(f"/x/{i}.mp4 0\n" for i in range(20)))
    source, first, second = (
        f"a={tmp_path / 'a.csv'}",
        Build(tmp_path / "m", holdout=0.5),
        Build(tmp_path / "m"),
    )
    run(first, source)
    assert first.stale(["a"]) == [] and second.stale(["a", "b"]) == ["a"]
    command = [sys.executable, ROOT / "tools/build_manifest.py", "--out", tmp_path / "m", "--set", source]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (
        done.returncode == 0 and f"note: {tmp_path / 'm-val'} holds files of a from an earlier" in done.stdout
    )


def test_several_sets_and_sources_and_a_later_call(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.csv").write_text("/x/1.mp4 0\n")
    (tmp_path / "b.csv").write_text("/x/2.mp4 0\n")
    run(Build(tmp_path / "m"), f"x={tmp_path / 'a.csv'}", f"y={folder}", f"x={tmp_path / 'b.csv'}")
    assert [item.path for item in items(tmp_path / "m", "x")] == ["/x/1.mp4", "/x/2.mp4"]
    run(Build(tmp_path / "m"), f"z={tmp_path / 'b.csv'}")
    assert list(Manifest.open(tmp_path / "m").sets) == ["x", "y", "z"]


def test_a_build_that_fails_leaves_the_old_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("/x/1.mp4 0\n")
    run(Build(tmp_path / "m"), f"x={tmp_path / 'a.csv'}")
    (tmp_path / "a.csv").write_text("/x/gone.mp4 0\n")
    with pytest.raises(ConfigError, match="set x: none of its 1 files .*gone.mp4 .*No such file"):
        run(Build(tmp_path / "m", probe=True), f"x={tmp_path / 'a.csv'}")
    assert [item.path for item in items(tmp_path / "m", "x")] == ["/x/1.mp4"]


def test_relative_paths(tmp_path: Path, folder: Path) -> None:
    run(Build(tmp_path / "m", relative=True), f"s={folder}")
    (tmp_path / "moved").mkdir()
    for name in ("m", folder.name):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    assert all(Path(item.path).exists() for item in items(tmp_path / "moved/m", "s"))


def test_a_name_that_is_no_utf8_is_reported(tmp_path: Path) -> None:
    media.image(tmp_path / "d" / "ok.png")
    try:
        os.rename(tmp_path / "d" / "ok.png", os.fsencode(tmp_path / "d") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    media.image(tmp_path / "d" / "ok.png")
    [report] = run(Build(tmp_path / "m"), f"s={tmp_path / 'd'}")
    assert dict(report.rejected) == {"unreadable": 1} and report.kinds["image"] == 1


@pytest.mark.parametrize(
    ("settings", "sets", "message"),
    [
        ({}, ["s"], "name=path"),
        ({}, ["s=/no/such/place"], "there is no /no/such/place"),
        ({}, ["a/b=."], "'a/b'"),
        ({}, ["s={here}/file.mp4"], "give a folder or a list"),
        ({}, ["s={here}/empty"], "set s: no video or image files in .*empty"),
        ({"holdout": 1.5}, ["s={here}/one"], "--holdout 1.5"),
        ({"holdout": 1e-9}, ["s={here}/one"], "holds nothing out of 1 files"),
        ({"holdout": 1 - 1e-9}, ["s={here}/one"], "all its 1 files were held out"),
        ({"jobs": 0}, ["s={here}/one"], "--jobs 0"),
        (
            {"out": Path("/m"), "holdout": 0.5, "holdout_out": Path("/m/../m")},
            ["s={here}/one"],
            "--holdout-out /m/../m is --out itself",
        ),
        (
            {"out": Path(__file__)},
            ["s={here}/one"],
            r"test_data_build\.py cannot be written \(Not a directory\)",
        ),
        ({}, ["s={here}/one:film"], "one:film; KIND is video or image"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, settings: dict, sets: list[str], message: str) -> None:
    (tmp_path / "file.mp4").touch()
    (tmp_path / "empty").mkdir()
    media.image(tmp_path / "one" / "i.png")
    with pytest.raises(ConfigError, match=message):
        run(Build(**{"out": tmp_path / "m"} | settings), *(text.format(here=tmp_path) for text in sets))


def test_extensions() -> None:
    assert [kind_of(n) for n in ("a.MP4", "b.webm", "c.JPEG", "d", "e.tar.gz")] == [
        "video",
        "video",
        "image",
        None,
        None,
    ]


def test_the_command(tmp_path: Path, folder: Path) -> None:
    command = [sys.executable, ROOT / "tools/build_manifest.py", "--out", tmp_path / "m", "--jobs", "1"]
    (folder / "dog" / "bad.avi").write_text("torn")
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run([*command, "--set", f"s={folder}", "--probe"], **options)
    assert done.returncode == 0, done.stderr
    assert "s: 2 images, 2 videos" in done.stdout and "1 unreadable" in done.stdout
    assert str(tmp_path / "m" / "rejected.tsv") in done.stdout and "4 rows in s" in done.stdout
    (tmp_path / "list.csv").write_text("/x/1.mp4 0\n")
    (tmp_path / "m" / ".probed" / "t").touch()  # a write that fails, as on a full disk
    failed = subprocess.run([*command, "--set", f"t={tmp_path / 'list.csv'}", "--probe"], **options)
    assert failed.returncode == 2 and failed.stderr.startswith("build_manifest: ") and "/t" in failed.stderr
    failed = subprocess.run([*command, "--set", "s=/no/such/place"], **options)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr
