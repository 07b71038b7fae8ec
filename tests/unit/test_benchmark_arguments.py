"""What benchmarks refuse, or leave out, before they measure."""

import sys
from pathlib import Path

import media
import pytest

from nextvid_mcore.config import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "tau=x"], "'tau=x' wants a whole number"),
        (["--case", "tau"], "'tau' is not KEY=VALUE"),
        (["--steps", "0"], "--steps 0 --warmup 3: give 1 or more"),
        (["--warmup", "-1"], "--warmup -1: give 1 or more, and 0 or more"),
    ],
)
def test_train_step(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    import train_step

    with pytest.raises(SystemExit, match="2"):
        train_step.parse(["tiny", *arguments])
    assert message in capsys.readouterr().err


def test_fp8_of_a_case() -> None:
    import train_step

    assert train_step.fp8_config("student:current,decoder:delayed", 1).used == {
        "student": "current",
        "decoder": "delayed",
    }
    with pytest.raises(ConfigError, match="fp8=foo:current: the roles are all, student"):
        train_step.fp8_config("foo:current", 1)


def test_videos_that_cannot_be_read_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import decode

    media.video(tmp_path / "a.avi").rename(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"junk")
    assert [path.name for path in decode.readable(tmp_path)] == ["a.mp4"]
    assert "left out: " in capsys.readouterr().out
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(SystemExit, match="no .mp4 file to read"):
        decode.readable(tmp_path)
