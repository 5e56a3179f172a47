import numpy as np
import pytest

from otau.robot import ActionLayout, open_robot, registry, robot_names
from otau.runtime.errors import MismatchError, UsageError

LAYOUT = ActionLayout(names=("x", "grip"), units=("m", "1"), low=(-0.1, 0.0), high=(0.1, 1.0))


class _Entry:
    """Stands in for a plug-in's entry point, which only an installed package can have."""

    def __init__(self, name, adapter):
        self.name, self.value, self._adapter = name, f"package:{name}", adapter

    def load(self):
        if isinstance(self._adapter, Exception):
            raise self._adapter
        return self._adapter


class _Entries(dict):
    @property
    def names(self):
        return set(self)


@pytest.fixture
def plug_in(monkeypatch):
    def register(name, adapter):
        entry = _Entry(name, adapter)
        monkeypatch.setattr(
            registry,
            "entry_points",
            lambda group, name=None: _Entries({entry.name: entry}) if name is None else (entry,),
        )

    return register


def test_actions_are_clipped_to_their_limits():
    limited = LAYOUT.limited(np.array([0.05, 7.0]))
    assert limited.dtype == np.float32
    assert np.allclose(limited, [0.05, 1.0])
    assert np.allclose(LAYOUT.limited(np.array([-1, -1])), [-0.1, 0.0])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(3), r"x, grip"),
        (np.zeros((1, 2)), r"float64 \(1, 2\)"),
        (np.array(["a", "b"]), "shape"),
        (np.array([True, False]), "bool"),
        (np.array([0.0, np.nan]), r"where:\s+grip"),
        (np.array([-np.inf, 0.0]), r"where:\s+x"),
    ],
)
def test_what_is_no_action_is_refused(action, message):
    with pytest.raises(UsageError, match=message):
        LAYOUT.limited(action)


def test_the_adapters_of_this_package_are_registered():
    assert {"libero", "robosuite"} <= set(robot_names())


def test_an_unknown_robot_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError) as refusal:
        open_robot("robosuit:Lift")
    assert "did you mean 'robosuite'?" in refusal.value.fix


@pytest.mark.parametrize("task", ["Lif", "", "lift", "Wipe"])
def test_an_unknown_task_is_refused_with_the_valid_names(task):
    with pytest.raises(UsageError) as refusal:
        open_robot(f"robosuite:{task}")
    assert "Lift" in refusal.value.fix


def test_a_task_and_options_reach_the_adapter(plug_in):
    plug_in("toy", lambda task, speed=1: (task, speed))
    assert open_robot("toy:a:b", speed=2) == ("a:b", 2)
    assert open_robot("toy") == ("", 1)
    with pytest.raises(UsageError, match="no option 'sped'") as refusal:
        open_robot("toy:a", sped=2)
    assert "did you mean 'speed'?" in refusal.value.fix
    plug_in("toy", lambda task: task)
    with pytest.raises(UsageError, match="no option 'sped'") as refusal:
        open_robot("toy:a", sped=2)
    assert refusal.value.fix == "leave it out"


@pytest.mark.parametrize("failure", [ImportError("no module named toys"), AttributeError("no Toy")])
def test_an_adapter_that_does_not_load_says_so(plug_in, failure):
    plug_in("toy", failure)
    with pytest.raises(MismatchError, match="does not load") as refusal:
        open_robot("toy:a")
    assert refusal.value.where == "package:toy"
