"""The contract of a robot as tests, which the tests of every adapter inherit.

Example:
    from otau.robot.conformance import RobotConformance

    class TestMyRobot(RobotConformance):
        @classmethod
        def open_robot(cls):
            return MyRobot("pick")

pytest finds the class by its name and runs the inherited methods; this module does not import pytest.
For messages that show values, `pytest.register_assert_rewrite("otau.robot.conformance")` in conftest.py.
On real hardware the suite moves the robot: by up to ten actions from its start, with the limits of its
actions among them.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator

import numpy as np

from otau.robot.protocol import Robot, RobotSpec
from otau.runtime.errors import UsageError

__all__ = ["RobotConformance"]

_STEPS = 10


class RobotConformance(abc.ABC):
    """Tests of one adapter; a subclass says how to open its robot.

    One robot serves all tests, as opening a simulator takes seconds; each test resets it. One test opens
    a second robot, and closes it.
    """

    reproducible = True
    """Whether the same seed gives the same start; a real robot says False."""

    robot: Robot

    @classmethod
    @abc.abstractmethod
    def open_robot(cls) -> Robot:
        """A robot, open and not yet reset."""

    @classmethod
    def setup_class(cls) -> None:
        """Open the robot that the tests share."""
        cls.robot = cls.open_robot()

    @classmethod
    def teardown_class(cls) -> None:
        """Close it."""
        cls.robot.close()

    @property
    def spec(self) -> RobotSpec:
        """The robot's spec."""
        return self.robot.spec

    @property
    def rest(self) -> np.ndarray:
        """(a,) the middle of the limits, which is no motion for a robot that takes deltas."""
        return (np.array(self.spec.action.low) + np.array(self.spec.action.high)) / 2

    def test_is_a_robot(self) -> None:
        """It has every member of the protocol."""
        assert isinstance(self.robot, Robot)

    def test_spec_is_complete(self) -> None:
        """Every dimension is named once and has a unit; every limit is one."""
        spec = self.spec
        adapter, colon, _ = spec.name.partition(":")
        assert adapter
        assert colon
        assert spec.rate > 0
        assert spec.prompt.strip() == spec.prompt != ""
        assert spec.max_steps is None or spec.max_steps > 0
        assert [camera.name for camera in spec.cameras] == [f"camera{i}" for i in range(len(spec.cameras))]
        assert all(camera.height > 0 and camera.width > 0 for camera in spec.cameras)
        for layout in (spec.state, spec.action):
            assert len(set(layout.names)) == len(layout.names) == len(layout.units) > 0
        limits = spec.action
        assert len(limits.low) == len(limits.high) == len(limits.names)
        assert all(low < high for low, high in zip(limits.low, limits.high, strict=True))

    def test_refuses_calls_out_of_order(self) -> None:
        """No episode before reset, nothing at all after close; but stop and close never fail."""
        with self.open_robot() as robot:
            robot.stop()
            with _refused():
                robot.observe()
            with _refused():
                robot.act(self.rest)
        with _refused():
            robot.reset(0)
        with _refused():
            robot.observe()
        with _refused():
            robot.act(self.rest)
        robot.stop()
        robot.close()

    def test_observation_is_as_specified(self) -> None:
        """Names, shapes and types are the spec's; the pictures show something."""
        self.robot.reset(0)
        observation = self.robot.observe()
        assert list(observation.images) == [camera.name for camera in self.spec.cameras]
        for camera in self.spec.cameras:
            image = observation.images[camera.name]
            assert image.dtype == np.uint8
            assert image.shape == (camera.height, camera.width, 3)
            assert image.std() > 1, f"{camera.name} shows one colour"
        assert observation.state.dtype == np.float32
        assert observation.state.shape == (len(self.spec.state.names),)
        assert np.isfinite(observation.state).all()
        assert observation.prompt == self.spec.prompt

    def test_observation_is_a_snapshot(self) -> None:
        """What was observed stays as it was when the robot moves on."""
        self.robot.reset(0)
        observation = self.robot.observe()
        images = {name: image.copy() for name, image in observation.images.items()}
        state = observation.state.copy()
        self._move()
        self.robot.observe()
        assert np.array_equal(observation.state, state)
        assert all(np.array_equal(observation.images[name], image) for name, image in images.items())

    def test_observing_does_not_move(self) -> None:
        """Looking twice shows the same."""
        if not self.spec.simulated:
            return
        self.robot.reset(0)
        first, second = self.robot.observe(), self.robot.observe()
        assert np.array_equal(first.state, second.state)
        for name, image in first.images.items():
            assert np.array_equal(image, second.images[name]), f"{name} differs"

    def test_moving_changes_what_is_observed(self) -> None:
        """The state and every picture follow the robot."""
        self.robot.reset(0)
        before = self.robot.observe()
        self._move()
        after = self.robot.observe()
        assert not np.array_equal(before.state, after.state)
        for name, image in before.images.items():
            assert not np.array_equal(image, after.images[name]), f"{name} shows no motion"

    def test_acts_at_and_beyond_its_limits(self) -> None:
        """The limits are actions; what is beyond them is clipped, in any real type."""
        self.robot.reset(0)
        for action in (self.spec.action.low, self.spec.action.high, np.array(self.spec.action.high) * 1.5):
            for dtype in (np.float32, np.float64):
                result = self.robot.act(np.array(action, dtype))
                assert result.success in (True, False, None)
                assert result.done in (True, False)
                if result.done:
                    self.robot.reset(0)

    def test_refuses_actions_that_are_none(self) -> None:
        """A wrong shape, a wrong type and NaN are refused, and leave the robot where it was."""
        self.robot.reset(0)
        before = self.robot.observe().state
        rest = self.rest
        not_finite = rest.copy()
        not_finite[-1] = np.nan
        infinite = rest.copy()
        infinite[0] = np.inf
        for action in (rest[:-1], np.append(rest, 0.0), rest[None], rest.astype(str), not_finite, infinite):
            with _refused():
                self.robot.act(action)
        if self.spec.simulated:
            assert np.array_equal(self.robot.observe().state, before)

    def test_resets_are_reproducible(self) -> None:
        """A seed gives one start, whatever came before it; other seeds give others."""
        if not self.reproducible:
            return
        self.robot.reset(3)
        first = self.robot.observe()
        self._move()
        self.robot.reset(4)
        other = self.robot.observe()
        self.robot.reset(3)
        again = self.robot.observe()
        assert np.array_equal(first.state, again.state)
        for name, image in first.images.items():
            assert np.array_equal(image, again.images[name]), f"{name} differs"
        same = [np.array_equal(image, other.images[name]) for name, image in first.images.items()]
        assert not all(same), "seeds 3 and 4 look the same"

    def test_reset_leaves_the_random_streams_alone(self) -> None:
        """A seeded reset does not disturb who else draws from NumPy's global stream."""
        state = np.random.get_state()
        try:
            np.random.seed(7)
            expected = np.random.random(4)
            np.random.seed(7)
            self.robot.reset(0)
            assert np.array_equal(np.random.random(4), expected)
        finally:
            np.random.set_state(state)

    def test_reset_without_a_seed(self) -> None:
        """Any start will do; it is one."""
        self.robot.reset()
        self.robot.act(self.rest)

    def test_stop_ends_the_episode_and_may_be_repeated(self) -> None:
        """After stop the robot does not move until it is reset; it can still look."""
        self.robot.reset(0)
        self.robot.stop()
        self.robot.stop()
        self.robot.observe()
        with _refused():
            self.robot.act(self.rest)
        self.robot.reset(0)
        self.robot.act(self.rest)

    def test_stops_after_a_failure(self) -> None:
        """A call that failed does not keep the robot from stopping."""
        self.robot.reset(0)
        with _refused():
            self.robot.act(self.rest * np.nan)
        self.robot.stop()

    def _move(self) -> None:
        """Some actions, half way to the upper limits, or until the episode ends."""
        action = (self.rest + np.array(self.spec.action.high)) / 2
        for _ in range(_STEPS):
            if self.robot.act(action).done:
                return


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """The block must raise a UsageError."""
    try:
        yield
    except UsageError:
        return
    raise AssertionError("this was not refused with a UsageError")
