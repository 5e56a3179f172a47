import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest

from otau.robot import ActionLayout, CameraView, RobotSpec, StateLayout, StepResult
from otau.robot.conformance import RobotConformance
from otau.robot.episode import run_episode
from otau.robot.pace import Pace
from otau.runtime import Observation
from otau.runtime.errors import UsageError


class PointRobot:
    """A point on a line that is to be moved to 1: the smallest robot that meets the protocol."""

    def __init__(self, *, simulated=True, rate=200.0, fail_at=None):
        self.spec = RobotSpec(
            name="point:reach",
            rate=rate,
            cameras=(CameraView("camera0", 8, 8),),
            state=StateLayout(("x",), ("m",)),
            action=ActionLayout(("dx",), ("m",), (-0.25,), (0.25,)),
            prompt="go to one",
            simulated=simulated,
            max_steps=None,
        )
        self.phase = "idle"
        self.log = []
        self._x = 0.0
        self._fail_at = fail_at

    def reset(self, seed=None):
        self._require("idle", "running", "over")
        self._x = float(np.random.default_rng(seed).uniform(-0.01, 0.01))
        self.phase = "running"
        self.log.append("reset")

    def observe(self):
        self._require("running", "over")
        self.log.append("observe")
        image = np.zeros((8, 8, 3), np.uint8)
        image[4:] = round(self._x * 1e5) % 251 + 4
        return Observation({"camera0": image}, np.array([self._x], np.float32), self.spec.prompt)

    def act(self, action):
        self._require("running")
        (step,) = self.spec.action.limited(action)
        if self._fail_at is not None and self.log.count("act") == self._fail_at[0]:
            raise self._fail_at[1]
        self._x += float(step)
        self.log.append("act")
        success = self._x >= 1
        if success:
            self.phase = "over"
        return StepResult(success=success, done=success)

    def stop(self):
        self.log.append("stop")
        if self.phase == "running":
            self.phase = "over"

    def close(self):
        self.phase = "closed"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def _require(self, *phases):
        if self.phase not in phases:
            raise UsageError(f"the point is {self.phase}")


class ConstantPolicy:
    """Ten actions a chunk, of which four are meant to be executed."""

    def __init__(self, action=0.1, seconds=0.0):
        self.seen = []
        self.noise = []
        self._action, self._seconds = action, seconds

    def infer(self, observation, *, rng):
        self.seen.append(observation)
        self.noise.append(rng.standard_normal())
        time.sleep(self._seconds)
        return SimpleNamespace(actions=np.full((10, 1), self._action, np.float32), n_action_steps=4)


class TestPointRobot(RobotConformance):
    @classmethod
    def open_robot(cls):
        return PointRobot()


def test_the_policy_looks_once_a_chunk():
    robot, policy = PointRobot(), ConstantPolicy()
    counted = []
    result = run_episode(robot, policy, steps=7, seed=0, on_step=counted.append)
    assert robot.log == ["reset", "observe", *["act"] * 4, "observe", *["act"] * 3, "stop"]
    assert (result.steps, len(result.latencies_ms), result.success) == (7, 2, False)
    assert counted == [1, 2, 3, 4, 5, 6, 7]
    assert result.late_ticks is None


def test_success_ends_the_episode():
    robot = PointRobot()
    result = run_episode(robot, ConstantPolicy(), steps=1000, seed=0)
    assert result.success is True
    assert result.steps == robot.log.count("act") <= 11
    assert robot.log[-1] == "stop"


def test_frames_are_those_of_every_tick_and_of_the_end():
    robot, frames = PointRobot(), []
    run_episode(robot, ConstantPolicy(), steps=6, seed=0, on_frame=frames.append)
    assert robot.log == ["reset", *["observe", "act"] * 6, "stop", "observe"]
    assert len(frames) == 7


def test_the_prompt_is_the_robots_unless_another_is_given():
    for given, seen in ((None, "go to one"), ("stay", "stay")):
        policy = ConstantPolicy()
        run_episode(PointRobot(), policy, steps=5, prompt=given)
        assert {observation.prompt for observation in policy.seen} == {seen}


def test_a_seed_repeats_the_start_and_the_noise():
    policies = [ConstantPolicy() for _ in range(3)]
    for policy, seed in zip(policies, (5, 5, 6), strict=True):
        run_episode(PointRobot(), policy, steps=8, seed=seed)
    first, again, other = ((policy.noise, float(policy.seen[0].state[0])) for policy in policies)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("motor"), UsageError("no")])
def test_the_robot_is_stopped_whatever_happens(failure):
    robot = PointRobot(fail_at=(2, failure))
    with pytest.raises(type(failure)):
        run_episode(robot, ConstantPolicy(), steps=9)
    assert robot.log[-1] == "stop"
    assert robot.phase == "over"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("first")])
def test_a_robot_that_does_not_stop_hides_nothing(monkeypatch, caplog, failure):
    robot = PointRobot(fail_at=(2, failure))

    def stop():
        raise OSError("the bus is gone")

    monkeypatch.setattr(robot, "stop", stop)
    with pytest.raises(type(failure)) as raised:
        run_episode(robot, ConstantPolicy(), steps=9)
    assert raised.value is failure
    assert "could not be stopped: the bus is gone" in caplog.text


def test_a_policy_that_fails_stops_the_robot():
    robot, policy = PointRobot(), ConstantPolicy(action=np.nan)
    with pytest.raises(UsageError, match="not finite"):
        run_episode(robot, policy, steps=9)
    assert robot.log == ["reset", "observe", "stop"]


@pytest.mark.parametrize("steps", [0, -1])
def test_an_episode_has_steps(steps):
    robot = PointRobot()
    with pytest.raises(UsageError, match="at least one step"):
        run_episode(robot, ConstantPolicy(), steps=steps)
    assert robot.log == []


@pytest.mark.parametrize(
    ("simulated", "realtime", "paced"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_a_real_robot_is_paced_and_a_simulated_one_on_demand(monkeypatch, simulated, realtime, paced):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    robot = PointRobot(simulated=simulated, rate=0.01)
    result = run_episode(robot, ConstantPolicy(0.01), steps=10, realtime=realtime)
    assert (result.late_ticks is not None) == paced
    # The policy's own sleep is of 0 seconds; a tick of this robot's is of a hundred.
    assert sum(seconds > 90 for seconds in slept) == (10 if paced else 0)


def test_a_slow_policy_makes_ticks_late():
    robot = PointRobot(simulated=False, rate=100.0)
    result = run_episode(robot, ConstantPolicy(0.01, seconds=0.035), steps=8)
    assert result.late_ticks >= 2


def test_deadlines_do_not_drift_and_missed_ones_are_skipped(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    slept = []

    def sleep(seconds):
        slept.append(round(seconds, 6))
        clock.now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", sleep)
    pace = Pace(10.0)
    for work in (0.03, 0.07, 0.0):
        clock.now += work
        pace.wait()
    assert slept == [0.07, 0.03, 0.1]
    assert round(clock.now, 6) == 100.3
    clock.now += 0.25
    pace.wait()
    assert (pace.late, round(clock.now, 6)) == (1, 100.55)
    pace.wait()
    assert round(clock.now, 6) == 100.6


def test_latency_percentiles():
    result = dataclasses.replace(
        run_episode(PointRobot(), ConstantPolicy(), steps=1), latencies_ms=(1.0, 2.0, 3.0)
    )
    assert result.latency_ms(50) == 2.0
    assert 2.9 < result.latency_ms(99) <= 3.0
