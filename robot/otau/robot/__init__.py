"""Robots: the protocol, its conformance suite, adapters, and the closed loop that drives them."""

from __future__ import annotations

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
