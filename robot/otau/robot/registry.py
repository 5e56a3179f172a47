"""From `--robot NAME:TASK` to a robot: adapters are entry points of the group `otau.robots`."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

from otau.robot.protocol import Robot
from otau.runtime.errors import MismatchError, UsageError, nearest_name

__all__ = ["open_robot", "robot_names"]

_GROUP = "otau.robots"


def robot_names() -> tuple[str, ...]:
    """The names of the installed adapters, sorted."""
    return tuple(sorted(entry_points(group=_GROUP).names))


def open_robot(target: str, **options: object) -> Robot:
    """Open the robot of `--robot NAME:TASK`.

    Args:
        target: Adapter and task. What follows the first colon is the adapter's own business.
        options: Keyword arguments of the adapter, such as LIBERO's `assets`. Its first is the task.

    Returns:
        The robot, open and not yet reset. Close it, or use it as a context manager.

    Raises:
        UsageError: Unknown adapter, task or option.
        MismatchError: The adapter, or what it needs, is not installed or does not load.
    """
    name, _, task = target.partition(":")
    if name not in robot_names():
        raise UsageError(
            f"there is no robot {name!r}", where=f"--robot {target}", fix=nearest_name(name, robot_names())
        )
    (entry,) = entry_points(group=_GROUP, name=name)
    try:
        adapter = entry.load()
    except (ImportError, AttributeError) as error:
        raise MismatchError(
            f"the robot {name!r} is registered but does not load", where=entry.value, got=error
        ) from error
    accepted = list(inspect.signature(adapter).parameters)[1:]
    for option in options:
        if option not in accepted:
            raise UsageError(
                f"the robot {name!r} has no option {option!r}",
                where=f"open_robot({target!r})",
                fix=nearest_name(option, accepted) if accepted else "leave it out",
            )
    return adapter(task, **options)
