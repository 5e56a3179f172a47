"""One simulated Panda arm in any environment of robosuite: what its own tasks and LIBERO share."""

from __future__ import annotations

import abc
import atexit
import contextlib
import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from otau.robot.interrupts import interrupts_deferred
from otau.robot.protocol import ActionLayout, CameraView, RobotSpec, StateLayout, StepResult
from otau.robot.simulator import import_robosuite, seeded
from otau.runtime import Observation
from otau.runtime.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PandaRobot", "panda_spec"]

_RATE = 20
"""Actions a second [Hz], as LIBERO's data was recorded."""

_CAMERAS = {"camera0": "agentview", "camera1": "robot0_eye_in_hand"}
"""Camera of the policy -> camera of robosuite."""

_SIZE = 256
"""Height and width of the pictures [px]."""

_STATE = StateLayout(
    names=("eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "finger_left", "finger_right"),
    units=("m", "m", "m", "rad", "rad", "rad", "m", "m"),
)

_ACTION = ActionLayout(
    names=("delta_x", "delta_y", "delta_z", "delta_rx", "delta_ry", "delta_rz", "gripper"),
    # What 1 stands for: robosuite's OSC_POSE moves by 5 cm and half a radian. Gripper: -1 open, 1 closed.
    units=("0.05 m", "0.05 m", "0.05 m", "0.5 rad", "0.5 rad", "0.5 rad", "1"),
    low=(-1.0,) * 7,
    high=(1.0,) * 7,
)

_PLACEMENT_TRIES = 10

_LOG = logging.getLogger(__name__)

_Phase = Literal["idle", "running", "over", "closed"]


def panda_spec(name: str, prompt: str, max_steps: int, assets: str | None = None) -> RobotSpec:
    """The spec that every task of the simulated Panda shares.

    Args:
        name: Adapter and task.
        prompt: The task in words.
        max_steps: Actions of an episode.
        assets: As in `RobotSpec`.
    """
    return RobotSpec(
        name=name,
        rate=float(_RATE),
        cameras=tuple(CameraView(camera, _SIZE, _SIZE) for camera in _CAMERAS),
        state=_STATE,
        action=_ACTION,
        prompt=prompt,
        simulated=True,
        max_steps=max_steps,
        assets=assets,
    )


class PandaRobot(abc.ABC):
    """A Panda arm in a robosuite environment; subclasses say which, and how an episode begins.

    Drawing takes far longer than simulating, so only `observe` draws.
    """

    _environment_options: ClassVar[dict[str, Any]] = {
        "has_renderer": False,
        "has_offscreen_renderer": True,
        "use_camera_obs": False,
        "control_freq": _RATE,
        "ignore_done": True,
    }
    """Of every environment: drawn on demand only, never over by robosuite's own count."""

    def __init__(self, spec: RobotSpec) -> None:
        """Build the environment, which takes some seconds.

        Args:
            spec: From `panda_spec`.
        """
        self._spec = spec
        self._phase: _Phase = "idle"
        self._steps = 0
        # Closed at the latest when the process ends, and before EGL is: of a context that outlives EGL,
        # robosuite's destructors print tracebacks. The last to be registered with atexit is called first.
        self._env: Any = None
        try:
            with interrupts_deferred():
                self._env = _placed(self._make)
                atexit.register(self.close)
        except KeyboardInterrupt:
            self.close()
            raise

    @abc.abstractmethod
    def _make(self) -> Any:
        """A new environment of robosuite, made with `_environment_options`."""

    def _begin(self, seed: int | None) -> None:
        """Bring the environment to the start of an episode; the random streams are seeded already."""
        _placed(self._env.reset)

    @property
    def spec(self) -> RobotSpec:
        """The robot and its task."""
        return self._spec

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode.

        Args:
            seed: The same seed gives the same start; None: any start.
        """
        self._require("idle", "running", "over")
        self._phase = "idle"
        with seeded(seed), interrupts_deferred():
            self._begin(seed)
        self._steps = 0
        self._phase = "running"

    def observe(self) -> Observation:
        """Draw both cameras and read the state.

        The pictures are OpenGL's turned by 180 degrees. OpenGL's first row is the bottom one, so this
        makes them upright, and mirrored left to right: +y, the robot's left, is on the left of
        camera0. LIBERO's data, and so every policy trained on it, has them this way round.

        Returns:
            `camera0` and `camera1` (256, 256, 3) uint8; state (8,) float32: position [m] and
            axis-angle [rad] of the end effector, positions of the two fingers [m].
        """
        self._require("running", "over")
        values = self._env._get_observations(force_update=True)
        axis_angle = import_robosuite().utils.transform_utils.quat2axisangle(values["robot0_eef_quat"])
        state = np.concatenate([values["robot0_eef_pos"], axis_angle, values["robot0_gripper_qpos"]])
        images = {camera: self._draw(source) for camera, source in _CAMERAS.items()}
        return Observation(images=images, state=state.astype(np.float32), prompt=self._spec.prompt)

    def act(self, action: np.ndarray) -> StepResult:
        """Simulate 50 ms with one action.

        Args:
            action: (7,) in [-1, 1]: step of the pose (6) and gripper (-1 open, 1 closed).

        Returns:
            Success as the task defines it; done on success and after `spec.max_steps` actions.
        """
        self._require("running")
        self._env.step(self._spec.action.limited(action))
        self._steps += 1
        success = bool(self._env._check_success())
        done = success or self._steps == self._spec.max_steps
        if done:
            self._phase = "over"
        return StepResult(success=success, done=done)

    def stop(self) -> None:
        """End the episode: a simulated arm stands still as long as nobody steps it."""
        if self._phase == "running":
            self._phase = "over"

    def close(self) -> None:
        """Free the simulation and its OpenGL context."""
        if self._phase == "closed":
            return
        with interrupts_deferred():
            self._phase = "closed"
            atexit.unregister(self.close)
            if self._env is not None:
                self._env.close()

    def __enter__(self) -> Self:
        """The robot itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop and close; what fails in that does not hide the error that led here."""
        try:
            self.stop()
            self.close()
        except Exception:
            if error is None:
                raise
            _LOG.debug("closing the simulation failed", exc_info=True)

    def _draw(self, camera: str) -> np.ndarray:
        """(256, 256, 3) uint8, turned by 180 degrees."""
        picture = self._env.sim.render(width=_SIZE, height=_SIZE, camera_name=camera)
        return np.ascontiguousarray(picture[::-1, ::-1])

    def _require(self, *phases: _Phase) -> None:
        """Refuse a call that comes at the wrong moment."""
        if self._phase in phases:
            return
        if self._phase == "closed":
            raise UsageError("the robot is closed", where=self._spec.name, fix="open it again")
        what = "the episode is over" if self._phase == "over" else "no episode has begun"
        raise UsageError(what, where=self._spec.name, fix="call reset first")


def _placed(attempt: Callable[[], Any]) -> Any:
    """Call what places objects at random, again where they collided.

    Raises:
        MismatchError: They collided every time.
    """
    collision = import_robosuite().utils.errors.RandomizationError
    for _ in range(_PLACEMENT_TRIES):
        with contextlib.suppress(collision):
            return attempt()
    raise MismatchError("the simulator found no way to place the objects", got=f"{_PLACEMENT_TRIES} tries")
