"""Robots: the protocol, its conformance suite, adapters, and the closed loop that drives them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otau.robot.protocol import ActionLayout, CameraView, Robot, RobotSpec, StateLayout, StepResult
    from otau.robot.registry import open_robot, robot_names

__all__ = [
    "ActionLayout",
    "CameraView",
    "Robot",
    "RobotSpec",
    "StateLayout",
    "StepResult",
    "open_robot",
    "robot_names",
]

_REGISTRY = ("open_robot", "robot_names")


def __getattr__(name: str) -> object:
    """Imports a public name when it is first asked for (PEP 562).

    `otau --help` needs none of them, nor the numpy they bring.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module("otau.robot.registry" if name in _REGISTRY else "otau.robot.protocol")
    value: object = getattr(home, name)
    globals()[name] = value
    return value
