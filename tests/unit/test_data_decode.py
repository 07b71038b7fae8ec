"""The right frames of a file, and bad files told apart."""

from __future__ import annotations

import pickle
import wave
from pathlib import Path

import media
import numpy as np
import pytest
from PIL import Image

from nextvid_mcore.data.decode import BadFile, Video, clip_indices, frame_step, probe, read_image


@pytest.mark.parametrize(
    ("native", "wanted", "step"),
    [
        (25, 4, 6),
        (29.97, 4, 7),
        (24, 4, 6),
        (4, 4, 1),
        (2, 4, 1),
        (30, 1, 30),
        (0, 4, 1),
        (float("nan"), 4, 1),
    ],
)
def test_frame_step(native: float, wanted: float, step: int) -> None:
    assert frame_step(native, wanted) == step


def test_clip_starts_are_uniform_over_all_that_fit() -> None:
    """20 frames, clips of 4 at step 3 span 10: 11 starts."""
    starts = [clip_indices(20, 3, 4, place)[0] for place in (np.arange(1100) + 0.5) / 1100]
    assert np.bincount(starts).tolist() == [100] * 11
    assert clip_indices(20, 3, 4, 0.999999).tolist() == [10, 13, 16, 19]
    assert clip_indices(20, 3, 4, None).tolist() == [5, 8, 11, 14]


def test_short_videos_repeat_their_last_frame() -> None:
    for place in (None, 0.0, 0.99):
        assert clip_indices(7, 3, 5, place).tolist() == [0, 3, 6, 6, 6]
        assert clip_indices(1, 1, 3, place).tolist() == [0, 0, 0]


def test_exactly_the_frames_asked_for(tmp_path: Path) -> None:
    video = Video(str(media.video(tmp_path / "v.avi", frames=40, fps=29.97)))
    assert video.frames == 40 and video.fps == pytest.approx(29.97, abs=1e-3)
    for wanted in ([0], [39], [3, 10, 17, 24], [30, 31, 5]):
        clip = video.read(np.array(wanted))
        assert clip.shape == (len(wanted), 48, 64, 3) and clip.dtype == np.uint8
        assert media.frame_numbers(clip) == wanted
    left, right = clip[..., :32, :].mean(), clip[..., 32:, :].mean()
    assert left - right == pytest.approx(20, abs=2)


@pytest.mark.parametrize("width", [16, 48, 72])
def test_narrow_videos_whose_rows_decord_miscounts(tmp_path: Path, width: int) -> None:
    video = Video(str(media.video(tmp_path / "a.avi", frames=12, height=40, width=width)))
    clip = video.read(np.array([3, 9, 3]))
    assert clip.shape == (3, 40, width, 3) and media.frame_numbers(clip) == [3, 9, 3]
    assert abs(clip[:, :, 2].astype(int) - clip[:, :, -3] - 20).max() < 6  # the left half is brighter


def test_frames_do_not_depend_on_what_was_read_before() -> None:
    """HEVC with open groups of pictures; decord itself fails this in about one of fifteen reads."""
    path = str(Path(__file__).parents[1] / "gpu" / "clips" / "hevc.mp4")
    kept = Video(path)
    for wanted in ([11, 12, 13, 35], [3, 10, 17, 24], [23, 24, 25], [35, 36], [0, 39], [35, 36]):
        assert (kept.read(np.array(wanted)) == Video(path).read(np.array(wanted))).all()


def test_probe(tmp_path: Path) -> None:
    assert probe(str(media.video(tmp_path / "v.avi", frames=9, fps=10.0)), "video") == (9, 10.0)
    assert probe(str(media.image(tmp_path / "i.png")), "image") == (1, 0.0)


@pytest.fixture
def bad_videos(tmp_path: Path) -> dict[str, Path]:
    good = media.video(tmp_path / "good.avi")
    files = {name: tmp_path / name for name in ("empty.mp4", "text.mp4", "sound.wav", "gone.mp4", "folder")}
    files["empty.mp4"].touch()
    files["text.mp4"].write_text("not a video\n" * 50)
    files["folder"].mkdir()
    with wave.open(str(files["sound.wav"]), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    files["head.avi"] = media.truncated(tmp_path / "head.avi", good, 0.01)
    return files


def test_bad_videos_are_bad_files_with_a_reason(
    bad_videos: dict[str, Path], capfd: pytest.CaptureFixture
) -> None:
    reasons = {}
    for name, path in bad_videos.items():
        with pytest.raises(BadFile) as caught:
            probe(str(path), "video")
        assert caught.value.path == str(path)
        reasons[name] = caught.value.reason
        assert reasons[name] and "\n" not in reasons[name] and str(path) not in reasons[name]
    assert "empty file" in reasons["empty.mp4"]
    assert "No such file" in reasons["gone.mp4"]
    assert "moov" in reasons["text.mp4"], "what ffmpeg printed tells more than the exception"
    assert capfd.readouterr().err == "", "decoders print nothing: the log names a file once"


def test_a_file_that_ends_early_is_bad_where_it_ends(tmp_path: Path) -> None:
    half = media.truncated(tmp_path / "half.avi", media.video(tmp_path / "good.avi", frames=40))
    video = Video(str(half))  # an AVI file opens without its end
    assert 0 < video.frames < 40
    with pytest.raises(BadFile, match="half.avi"):
        video.read(np.array([0, video.frames - 1]))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    name = "i.tif" if mode == "CMYK" else "i.png"
    pixels = read_image(str(media.image(tmp_path / name, level=255, size=(20, 10), mode=mode)))
    assert pixels.shape == (10, 20, 3) and pixels.dtype == np.uint8 and pixels.min() >= 250


def test_images_of_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "i.png")
    assert np.array_equal(read_image(str(tmp_path / "i.png"))[..., 1].ravel(), np.arange(256))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(BadFile, match="mode F have no known range"):
        read_image(str(tmp_path / "f.tif"))


def test_images_are_turned_as_exif_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "i.jpg", exif=exif)
    assert read_image(str(tmp_path / "i.jpg")).shape == (20, 10, 3)


def test_bad_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "good.jpg")
    torn = media.truncated(tmp_path / "torn.jpg", tmp_path / "good.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for path, word in (
        (torn, "truncated"),
        (tmp_path / "text.png", "cannot identify"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(BadFile, match=word):
            read_image(str(path))


def test_a_bad_file_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadFile("/a b.mp4", "why")))
    assert (error.path, error.reason, str(error)) == ("/a b.mp4", "why", "/a b.mp4: why")
