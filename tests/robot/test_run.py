import importlib.util
import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from otau.robot import ActionLayout, CameraView, RobotSpec, StateLayout, cli, registry
from otau.runtime import Bundle
from otau.runtime.errors import MismatchError, UsageError

pytestmark = pytest.mark.slow  # the bundle takes half a minute to compile

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed: make sim"
)
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None or "OTAU_LIBERO_ASSETS" not in os.environ,
    reason="LIBERO is not installed, or OTAU_LIBERO_ASSETS does not name its assets",
)


@needs_robosuite
def test_a_run_prints_one_document_and_films_a_moving_arm(otau, bundle, tmp_path, decode_video):
    video = tmp_path / "lift.mp4"
    done = otau(
        "run", bundle, "--robot", "robosuite:Lift", "--steps", 25, "--seed", 4, "--video", video, "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    latency = document.pop("latency_ms")
    assert 0 < latency["p50"] <= latency["p99"]
    assert document == {
        "robot": "robosuite",
        "task": "Lift",
        "bundle": str(bundle),
        "prompt": "lift the red cube",
        "assets": None,
        "seed": 4,
        "rate_hz": 20.0,
        "steps": 25,
        "chunks": 3,
        "success": False,
        "late_ticks": None,
        "video": str(video),
    }
    frames, _, _ = decode_video(video)
    assert [frame.shape for frame in frames] == [(256, 512, 3)] * 26
    for left in (0, 256):
        first, last = (frame[:, left : left + 256].astype(int) for frame in (frames[0], frames[-1]))
        moved = np.abs(first - last).max(axis=2) > 40  # far beyond what coding changes
        assert moved.mean() > 0.01


@needs_robosuite
def test_a_run_for_people_says_how_it_went(otau, bundle):
    done = otau("run", bundle, "--robot", "robosuite:Lift", "--steps", 3, "--prompt", "wave", "--realtime")
    assert done.returncode == 0, done.stderr
    for text in ("robosuite:Lift, 'wave'", "3 at 20 Hz, from 1 chunks", "p99", "success   no", "ticks"):
        assert text in done.stdout
    assert done.stderr == ""


@needs_robosuite
def test_a_terminal_shows_progress(otau_script, bundle):
    here, there = pty.openpty()
    command = [otau_script, "run", bundle, "--robot", "robosuite:Lift", "--steps", "5", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=there, timeout=120, check=True)
    os.close(there)
    assert "5/5" in os.read(here, 100_000).decode()
    os.close(here)
    assert json.loads(done.stdout)["steps"] == 5


@needs_robosuite
def test_ctrl_c_stops_the_robot_and_keeps_what_was_filmed(otau_script, bundle, tmp_path, decode_video):
    video = tmp_path / "lift.mp4"
    command = [otau_script, "run", bundle, "--robot", "robosuite:Lift", "--video", video, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [video]
    assert decode_video(video)[0]


@needs_libero
def test_libero_runs_and_keeps_stdout_clean(otau, bundle):
    done = otau("run", bundle, "--robot", "libero:libero_spatial/0", "--steps", 12, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["task"], document["steps"], document["chunks"]) == ("libero_spatial/0", 12, 2)
    assert document["prompt"].startswith("pick up the black bowl between")
    assert document["assets"] == str(Path(os.environ["OTAU_LIBERO_ASSETS"]).resolve())


@pytest.mark.parametrize(
    ("assets", "line"),
    [
        ("hub", "assets    the originals, from the hub"),
        ("/mine", "assets    /mine, which may not be the originals"),
        (None, None),
    ],
)
def test_a_run_for_people_says_where_its_assets_came_from(monkeypatch, capsys, assets, line):
    document = {"robot": "libero", "task": "libero_object/0", "prompt": "go", "steps": 1, "rate_hz": 20.0}
    document |= {"chunks": 1, "latency_ms": {"p50": 1.0, "p99": 1.0}, "success": True, "late_ticks": None}
    monkeypatch.setattr(cli, "_drive", lambda *arguments: {**document, "video": None, "assets": assets})
    cli.run(Path("bundle"), "libero:libero_object/0")
    shown = capsys.readouterr().out
    assert (line or "success") in shown
    assert ("assets" in shown) == (line is not None)
    assert ("published" in shown) == (assets == "/mine")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--robot", "robosuit:Lift"], 2, "did you mean 'robosuite'?"),
        (["--robot", "robosuite:Lif"], 2, "did you mean 'Lift'?"),
        (["--robot", "libero:libero_objet/0"], 2, "did you mean 'libero_object'?"),
        (["--robot", "libero:libero_object/0", "--libero-assets", "."], 2, "no folder of LIBERO assets"),
        (["--robot", "robosuite:Lift", "--libero-assets", "."], 2, "--libero-assets is for LIBERO"),
        (["--robot", "robosuite:Lift", "--steps", "0"], 2, "steps"),
        ([], 2, "--robot"),
    ],
)
def test_mistakes_are_told_without_a_traceback(otau, bundle, arguments, code, message):
    done = otau("run", bundle, *arguments, "--json")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@needs_robosuite
def test_a_video_that_cannot_be_written_is_refused_before_anything_moves(otau, bundle, tmp_path):
    done = otau("run", bundle, "--robot", "robosuite:Lift", "--video", tmp_path / "no/such.mp4")
    assert done.returncode == 2
    assert "the video cannot be written there" in done.stderr


def test_the_help_has_an_example(otau):
    done = otau("run", "--help")
    assert done.returncode == 0
    assert "Example: otau run my_bundle --robot robosuite:Lift" in done.stdout


def test_a_bundle_without_a_tokenizer_moves_nothing(monkeypatch, bundle):
    opened = Bundle.open(bundle)
    prompt = msgspec.structs.replace(opened.manifest.prompt, tokenizer=None)
    opened.manifest = msgspec.structs.replace(opened.manifest, prompt=prompt)
    robot = StrangeRobot(max_steps=10)
    monkeypatch.setattr(Bundle, "open", lambda path, **options: opened)
    monkeypatch.setattr(registry, "open_robot", lambda target: robot)
    with pytest.raises(UsageError, match="token ids") as refusal:
        cli.run(bundle, "strange:task")
    assert "--tokenizer" in refusal.value.fix
    assert not robot.moved


class StrangeRobot:
    """A robot that the bundle was not made for; it must not be moved."""

    def __init__(self, cameras=("camera0", "camera1"), states=8, actions=7, max_steps=None):
        self.moved = False
        self.spec = RobotSpec(
            name="strange:task",
            rate=20.0,
            cameras=tuple(CameraView(name, 8, 8) for name in cameras),
            state=StateLayout(tuple(f"s{i}" for i in range(states)), ("m",) * states),
            action=ActionLayout(
                tuple(f"a{i}" for i in range(actions)), ("m",) * actions, (-1.0,) * actions, (1.0,) * actions
            ),
            prompt="go",
            simulated=True,
            max_steps=max_steps,
        )

    def reset(self, seed=None):
        self.moved = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass


@pytest.mark.parametrize(
    ("robot", "failure", "message"),
    [
        (StrangeRobot(cameras=("camera0",)), MismatchError, "cameras"),
        (StrangeRobot(cameras=("camera0", "wrist")), MismatchError, "cameras"),
        (StrangeRobot(states=7), MismatchError, "state names"),
        (StrangeRobot(actions=8), MismatchError, "action names"),
        (StrangeRobot(), UsageError, "give --steps N"),
    ],
)
def test_a_robot_that_does_not_fit_is_not_moved(monkeypatch, bundle, robot, failure, message):
    monkeypatch.setattr(registry, "open_robot", lambda target: robot)
    with pytest.raises(failure, match=message):
        cli.run(bundle, "strange:task")
    assert not robot.moved
