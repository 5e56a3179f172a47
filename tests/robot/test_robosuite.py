import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from otau.robot.conformance import RobotConformance
from otau.robot.episode import run_episode
from otau.robot.robosuite import ROBOSUITE_TASKS, RobosuiteRobot
from otau.robot.simulator import import_robosuite
from otau.robot.video import VideoWriter
from otau.runtime.errors import MismatchError, UsageError

if importlib.util.find_spec("robosuite") is None:
    pytest.skip("robosuite is not installed: make sim", allow_module_level=True)


class TestLift(RobotConformance):
    @classmethod
    def open_robot(cls):
        return RobosuiteRobot("Lift")


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(ROBOSUITE_TASKS) - {"Lift"}))
def test_every_task_starts_and_steps(task):
    with RobosuiteRobot(task) as robot:
        robot.reset(1)
        start = robot._env.sim.get_state().flatten()
        robot.act(np.zeros(7))
        assert not robot.act(np.zeros(7)).done
        robot.reset(1)
        assert np.array_equal(robot._env.sim.get_state().flatten(), start)


def test_every_task_of_one_panda_arm_is_offered():
    environments = import_robosuite().environments.base.REGISTERED_ENVS  # LIBERO adds its own to them
    own = {name for name, kind in environments.items() if kind.__module__.startswith("robosuite.")}
    abstract = {"ManipulationEnv", "MujocoEnv", "RobotEnv", "SingleArmEnv", "TwoArmEnv"}
    single = {name for name in own - abstract if not name.startswith("TwoArm")}
    assert single == {*ROBOSUITE_TASKS, "Wipe"}


class LiftExpert:
    """Lifts the cube by knowing where it is: approach from above, descend, close, lift."""

    def __init__(self, robot):
        self._robot = robot
        self._closing = 0

    def infer(self, observation, *, rng):
        hand = observation.state[:3]
        cube = self._robot._env._get_observations()["cube_pos"]
        goal = cube + [0, 0, 0.08 if np.linalg.norm((cube - hand)[:2]) > 0.01 else 0]
        if np.linalg.norm(cube - hand) < 0.015 or self._closing:
            self._closing += 1
        if self._closing > 5:
            goal = hand + [0, 0, 0.1]
        gripper = 1.0 if self._closing else -1.0
        action = np.concatenate([np.clip((goal - hand) * 10, -1, 1), np.zeros(3), [gripper]])
        return SimpleNamespace(actions=action[None], n_action_steps=1)


@pytest.mark.slow
def test_an_expert_lifts_the_cube_and_the_film_shows_it(tmp_path, decode_video):
    path = tmp_path / "lift.mp4"
    with RobosuiteRobot("Lift") as robot, VideoWriter(path, robot.spec.rate) as video:
        result = run_episode(robot, LiftExpert(robot), steps=120, seed=0, on_frame=video.write)
        assert result.success
        with pytest.raises(UsageError, match="episode is over"):
            robot.act(np.zeros(7))
    frames, rate, _ = decode_video(path)
    assert len(frames) == result.steps + 1
    assert rate == robot.spec.rate
    # In the hand, the cube is nearer to the hand's camera.
    red = [
        (frame[:, 256:, 0].astype(int) - frame[:, 256:, 1] > 60).mean() for frame in (frames[0], frames[-1])
    ]
    assert red[1] > 2 * red[0] > 0


def test_pictures_are_upright_and_mirrored_as_in_libero():
    with RobosuiteRobot("Lift") as robot:
        robot.reset(0)
        picture = robot.observe().images["camera0"].astype(int)
        row, column = np.argwhere(picture[..., 0] - picture[..., 1] > 60).mean(axis=0)
        sim = robot._env.sim
        camera = sim.model.camera_name2id("agentview")
        offset = robot._env._get_observations()["cube_pos"] - sim.data.cam_xpos[camera]
        right, up, back = sim.data.cam_xmat[camera].reshape(3, 3).T @ offset
        focal = 128 / np.tan(np.radians(sim.model.cam_fovy[camera]) / 2)
        assert abs(right) > 0.01, "the cube must be off the middle for its side to be seen"
        assert np.isclose(row, 127.5 - focal * up / -back, atol=4)
        assert np.isclose(column, 127.5 - focal * right / -back, atol=4)  # a photograph has a plus here


def test_the_state_is_where_the_arm_is():
    with RobosuiteRobot("Lift") as robot:
        robot.reset(0)
        before = robot.observe().state
        for _ in range(10):
            robot.act(np.array([0, 0.5, 0.5, 0, 0, 0, 1.0]))
        after = robot.observe().state
        site = robot._env.sim.data.get_site_xpos("gripper0_grip_site")
        assert np.allclose(after[:3], site, atol=1e-6)
        assert (after - before)[1] > 0.05
        assert (after - before)[2] > 0.05
        assert np.ptp(after[6:]) < np.ptp(before[6:]), "1 closes the gripper"
        assert np.allclose(after[3:6], before[3:6], atol=0.2)


def test_placement_is_tried_again_where_objects_collide(monkeypatch):
    with RobosuiteRobot("Lift") as robot:
        collision = import_robosuite().utils.errors.RandomizationError
        outcomes = [collision(), collision(), None]
        monkeypatch.setattr(robot._env, "reset", lambda: _play(outcomes))
        robot.reset(0)
        assert outcomes == []
        monkeypatch.setattr(robot._env, "reset", lambda: _play([collision()]))
        with pytest.raises(MismatchError, match="no way to place"):
            robot.reset(0)
        with pytest.raises(UsageError, match="no episode"):
            robot.act(np.zeros(7))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_simulation_that_cannot_be_closed_hides_no_error(monkeypatch, error):
    robot = RobosuiteRobot("Lift")
    free = robot._env.close

    def fail():
        free()
        raise OSError("no context")

    monkeypatch.setattr(robot._env, "close", fail)
    with pytest.raises(error), robot:
        raise error


def _play(outcomes):
    outcome = outcomes.pop(0)
    if outcome is not None:
        raise outcome
