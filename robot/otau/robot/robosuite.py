"""robosuite's own tasks of one Panda arm: `--robot robosuite:Lift`. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

from otau.robot.panda import PandaRobot, panda_spec
from otau.robot.simulator import import_robosuite
from otau.runtime.errors import UsageError, nearest_name

__all__ = ["ROBOSUITE_TASKS", "RobosuiteRobot"]

ROBOSUITE_TASKS = {
    "Door": "open the door",
    "Lift": "lift the red cube",
    "NutAssembly": "put the square nut and the round nut on their pegs",
    "NutAssemblyRound": "put the round nut on its peg",
    "NutAssemblySingle": "put the nut on its peg",
    "NutAssemblySquare": "put the square nut on its peg",
    "PickPlace": "put the milk, the bread, the cereal and the can in their bins",
    "PickPlaceBread": "put the bread in its bin",
    "PickPlaceCan": "put the can in its bin",
    "PickPlaceCereal": "put the cereal in its bin",
    "PickPlaceMilk": "put the milk in its bin",
    "PickPlaceSingle": "put the object in its bin",
    "Stack": "stack the red cube on the green cube",
}
"""Task -> its prompt. Wipe is not among them: its tool takes the place of the gripper."""

_MAX_STEPS = 500
"""Actions of an episode, the horizon of robosuite's own benchmark."""


class RobosuiteRobot(PandaRobot):
    """A Panda arm in one of robosuite's tasks, under the OSC_POSE controller at 20 Hz."""

    def __init__(self, task: str) -> None:
        """Build the task's environment.

        Args:
            task: A name of `ROBOSUITE_TASKS`.

        Raises:
            UsageError: There is no such task.
            MissingDependencyError: robosuite or OpenGL is not installed.
        """
        if task not in ROBOSUITE_TASKS:
            raise UsageError(
                f"robosuite has no task {task!r} for one Panda arm",
                where="--robot robosuite:TASK",
                fix=nearest_name(task, ROBOSUITE_TASKS),
            )
        self._task = task
        super().__init__(panda_spec(f"robosuite:{task}", ROBOSUITE_TASKS[task], _MAX_STEPS))

    def _make(self) -> Any:
        robosuite = import_robosuite()
        controller = robosuite.load_controller_config(default_controller="OSC_POSE")
        return robosuite.make(
            self._task, robots="Panda", controller_configs=controller, **self._environment_options
        )
