import sys

import numpy as np
import pytest

from otau.robot.video import VideoWriter, side_by_side
from otau.runtime.errors import MissingDependencyError, UsageError

av = pytest.importorskip("av", reason="PyAV is not installed: make sim")


def frame(level):
    """Two cameras of different sizes; the first gets brighter with `level`."""
    return {
        "camera0": np.full((32, 48, 3), level, np.uint8),
        "camera1": np.full((16, 32, 3), 255, np.uint8),
    }


def film(path, levels, failure):
    with VideoWriter(path, rate=20.0) as video:
        for level in levels:
            video.write(frame(level))
        raise failure


def test_pictures_stand_side_by_side():
    picture = side_by_side({"a": np.full((3, 5, 3), 1, np.uint8), "b": np.full((2, 4, 3), 2, np.uint8)})
    assert picture.shape == (4, 10, 3)
    assert (picture[:3, :5] == 1).all()
    assert (picture[:2, 5:9] == 2).all()
    assert not picture[3].any()
    assert not picture[:, 9].any()


def test_a_video_holds_every_frame_at_the_robots_rate(tmp_path, decode_video):
    path = tmp_path / "run.mp4"
    levels = [0, 60, 120, 180, 240]
    with VideoWriter(path, rate=20.0) as video:
        for level in levels:
            video.write(frame(level))
            assert not path.exists()
    frames, rate, codec = decode_video(path)
    assert rate == 20.0
    assert codec in ("h264", "mpeg4")
    assert [picture.shape for picture in frames] == [(32, 80, 3)] * 5
    assert np.allclose([picture[:, :40].mean() for picture in frames], levels, atol=6)
    assert list(tmp_path.iterdir()) == [path]


def test_without_h264_it_is_mpeg4(tmp_path, decode_video, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with VideoWriter(tmp_path / "run.mp4", rate=20.0) as video:
        for level in (0, 200):
            video.write(frame(level))
    frames, _, codec = decode_video(tmp_path / "run.mp4")
    assert codec == "mpeg4"
    assert len(frames) == 2


def test_an_interrupted_video_is_complete_up_to_there(tmp_path, decode_video):
    with pytest.raises(KeyboardInterrupt):
        film(tmp_path / "run.mp4", (0, 100), KeyboardInterrupt())
    assert len(decode_video(tmp_path / "run.mp4")[0]) == 2


@pytest.mark.parametrize("written", [0, 3])
def test_a_failed_run_leaves_no_video_and_not_even_touches_an_older_one(tmp_path, written):
    path = tmp_path / "run.mp4"
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="motor"):
        film(path, range(written), RuntimeError("motor"))
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["run.avi", "run", "nowhere/run.mp4", "folder.mp4"])
def test_names_that_cannot_be_written_are_refused_at_once(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UsageError):
        VideoWriter(tmp_path / name, rate=20.0)


def test_without_pyav_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError) as failure:
        VideoWriter(tmp_path / "run.mp4", rate=20.0)
    assert "pip install av" in failure.value.fix
