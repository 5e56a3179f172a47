"""What a robot is to otau: a spec, and reset, observe, act, stop.

An adapter is any class with these members; nothing has to be inherited. Its tests inherit
`otau.robot.conformance.RobotConformance`, which states the contract in executable form.
"""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from otau.runtime.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

    from otau.runtime import Observation

__all__ = ["ActionLayout", "CameraView", "Robot", "RobotSpec", "StateLayout", "StepResult"]


@dataclasses.dataclass(frozen=True)
class CameraView:
    """One camera as `observe` returns it: `(height, width, 3)` uint8, upright."""

    name: str
    height: int
    """[px]"""
    width: int
    """[px]"""


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """The state vector, a name and a unit each dimension."""

    names: tuple[str, ...]
    units: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ActionLayout:
    """The action vector, a name, a unit and two limits each dimension."""

    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def limited(self, action: np.ndarray) -> np.ndarray:
        """The action as the robot will execute it.

        Values beyond the limits are clipped to them, not refused: a policy's output is a sample, and
        overshoots by a little all the time.

        Args:
            action: (a,), any real dtype.

        Returns:
            (a,) float32 within the limits.

        Raises:
            UsageError: The shape is another one, or a value is not finite.
        """
        values = np.asarray(action)
        expected = f"({len(self.names)},): {', '.join(self.names)}"
        if values.shape != (len(self.names),) or values.dtype.kind not in "fiu":
            got = f"{values.dtype} {values.shape}"
            raise UsageError("the action does not have the robot's shape", expected=expected, got=got)
        if not np.isfinite(values).all():
            bad = [name for name, value in zip(self.names, values, strict=True) if not np.isfinite(value)]
            raise UsageError(
                "the action is not finite", where=", ".join(bad), expected="finite numbers", got=values
            )
        return np.clip(values, self.low, self.high).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """Everything about a robot and its task that does not change while it runs."""

    name: str
    """Adapter and task, as `--robot` takes them: `robosuite:Lift`."""
    rate: float
    """Actions a second [Hz]."""
    cameras: tuple[CameraView, ...]
    """In the order in which the policy takes them: camera0, camera1, ..."""
    state: StateLayout
    action: ActionLayout
    prompt: str
    """The task in words."""
    simulated: bool
    """Whether time passes in `act` alone, by 1 / rate a call, so that the world waits for the policy."""
    max_steps: int | None
    """Actions after which an episode has failed; None where nothing ends it."""
    assets: str | None = None
    """Where a simulation's meshes and textures come from, where they may be others than the original
    ones, which makes success rates incomparable: `hub` for the originals, else a folder."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What came of one action."""

    success: bool | None
    """Whether the task is done; None where the robot cannot tell."""
    done: bool
    """Whether the episode is over, by success or by running out of steps."""


@runtime_checkable
class Robot(Protocol):
    """A robot, real or simulated; also a context manager that stops and closes it.

    The order is `reset`, then `observe` and `act` as often as one likes, then `stop`. Any other order
    is refused with a `UsageError`: `act` before `reset`, after `stop` or after the end of an episode;
    anything but `stop` and `close` after `close`.
    """

    @property
    def spec(self) -> RobotSpec:
        """The robot and its task."""
        ...

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode.

        Args:
            seed: The same seed gives the same start, where the robot can do that; None: any start.
        """
        ...

    def observe(self) -> Observation:
        """What the robot sees and feels now, ready for `otau.runtime.Policy.infer`.

        Returns:
            Images as `spec.cameras` says, state (s,) float32 in `spec.state.units`, `spec.prompt`.
        """
        ...

    def act(self, action: np.ndarray) -> StepResult:
        """Execute one action for 1 / rate seconds.

        Args:
            action: (a,) in `spec.action.units`; clipped to the limits.

        Returns:
            Whether the task succeeded and whether the episode is over.

        Raises:
            UsageError: Wrong shape, a value that is not finite, or a wrong moment.
        """
        ...

    def stop(self) -> None:
        """Halt safely. May be called at any moment, any number of times, after any failure."""
        ...

    def close(self) -> None:
        """Stop, and let go of the hardware or the simulator; may be called twice."""
        ...

    def __enter__(self) -> Self:
        """The robot itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop and close."""
        ...
