import pytest

from otau.robot.conformance import RobotConformance
from otau.robot.robosuite import RobosuiteRobot

pytest.importorskip("robosuite", reason="robosuite is not installed: make sim")


class TestLift(RobotConformance):
    @classmethod
    def open_robot(cls):
        return RobosuiteRobot("Lift")
