"""The closed loop: observe, infer when the chunk runs out, act, at the robot's rate."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from otau.robot.pace import Pace
from otau.robot.protocol import Robot
from otau.runtime.errors import UsageError

if TYPE_CHECKING:
    from otau.runtime import Observation, Policy

__all__ = ["EpisodeResult", "run_episode"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """What happened in an episode."""

    steps: int
    """Actions executed."""
    success: bool | None
    """Whether the task was done at the end; None where the robot cannot tell."""
    latencies_ms: tuple[float, ...]
    """Time from observation to action chunk [ms], one a chunk."""
    late_ticks: int | None
    """Ticks that missed their deadline; None where the robot ran unpaced."""

    def latency_ms(self, percent: float) -> float:
        """A percentile of the latencies [ms]."""
        return float(np.percentile(self.latencies_ms, percent))


def run_episode(
    robot: Robot,
    policy: Policy,
    *,
    steps: int,
    prompt: str | None = None,
    seed: int | None = None,
    realtime: bool = False,
    on_frame: Callable[[Mapping[str, np.ndarray]], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> EpisodeResult:
    """Drive a robot with a policy for one episode, and stop it however that ends.

    A real robot is paced by the clock: every action at its deadline. A simulated one advances by
    1 / rate a step and waits for the policy, so it runs as fast as it can unless `realtime` is set.
    The policy sees the robot once a chunk; each chunk is executed to its `n_action_steps`, or less
    where the episode ends.

    Args:
        robot: Open; it is reset here.
        policy: Must fit the robot: see `Bundle.require`.
        steps: Actions at most.
        prompt: The task in words; None: the robot's own.
        seed: Of the robot's start and of the policy's noise; None: any.
        realtime: Pace a simulated robot too.
        on_frame: Called with the pictures `(h, w, 3)` uint8 of every tick and of the end. The robot
            then draws at every tick, which a simulator does at a tenth of its speed.
        on_step: Called with the number of actions executed, after each.

    Returns:
        Steps, success, latencies.

    Raises:
        UsageError: `steps` is not positive.
        OtauError: Of the robot or the policy; the robot has been stopped first, as on Ctrl-C.
    """
    if steps < 1:
        raise UsageError("an episode needs at least one step", expected="1 or more", got=steps)
    buffer = _ChunkBuffer(policy, np.random.default_rng(seed))
    pace: Pace | None = None
    success: bool | None = None
    executed = 0
    try:
        robot.reset(seed)
        if realtime or not robot.spec.simulated:
            pace = Pace(robot.spec.rate)
        while executed < steps:
            if on_frame is not None or buffer.empty:
                observation = robot.observe()
                if on_frame is not None:
                    on_frame(observation.images)
                if prompt is not None:
                    observation = dataclasses.replace(observation, prompt=prompt)
                if buffer.empty:
                    buffer.fill(observation)
            result = robot.act(buffer.take())
            executed += 1
            success = result.success
            if on_step is not None:
                on_step(executed)
            if result.done:
                break
            if pace is not None:
                pace.wait()
    except BaseException:
        try:
            robot.stop()
        except Exception as failure:  # must be known, and must not hide what came first
            _LOG.error("the robot could not be stopped: %s", failure)
        raise
    robot.stop()
    if on_frame is not None:
        on_frame(robot.observe().images)
    late = None if pace is None else pace.late
    return EpisodeResult(executed, success, tuple(buffer.latencies_ms), late)


class _ChunkBuffer:
    """The actions that are still to be executed, refilled by the policy."""

    def __init__(self, policy: Policy, rng: np.random.Generator) -> None:
        self._policy = policy
        self._rng = rng
        self._actions: deque[np.ndarray] = deque()
        self.latencies_ms: list[float] = []

    @property
    def empty(self) -> bool:
        return not self._actions

    def fill(self, observation: Observation) -> None:
        start = time.perf_counter()
        chunk = self._policy.infer(observation, rng=self._rng)
        self.latencies_ms.append((time.perf_counter() - start) * 1e3)
        self._actions.extend(chunk.actions[: chunk.n_action_steps])

    def take(self) -> np.ndarray:
        return self._actions.popleft()
