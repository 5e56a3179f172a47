import importlib.util
import signal
import subprocess
import sys
import threading

import pytest

from otau.robot.interrupts import interrupts_deferred

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed: make sim"
)

# Sends itself SIGINT at one call of a function of robosuite, then is `otau`.
INTERRUPTED_CALL = """
import functools, importlib, os, signal, sys

module, owner, name, turn = sys.argv[1:5]
calls = 0

def interrupting(function):
    @functools.wraps(function)
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(turn):
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **options)
    return call

from otau.robot.simulator import import_robosuite
from otau.runtime.cli import main

import_robosuite()
holder = getattr(importlib.import_module(module), owner)
setattr(holder, name, interrupting(getattr(holder, name)))
sys.argv = ["otau", *sys.argv[5:]]
try:
    main()
finally:
    assert calls >= int(turn), "nothing was interrupted"
"""

BASE = ("robosuite.environments.base", "MujocoEnv")
RENDERER = ("robosuite.utils.binding_utils", "MjRenderContext")
SIMULATION = ("robosuite.utils.binding_utils", "MjSim")
OBSERVABLE = ("robosuite.utils.observables", "Observable")


@pytest.mark.slow  # the bundle takes half a minute to compile
@needs_robosuite
@pytest.mark.parametrize(
    ("owner", "name", "turn"),
    [
        pytest.param(BASE, "_initialize_sim", 1, id="build-before-a-context"),
        pytest.param(RENDERER, "_set_mujoco_context_and_buffers", 1, id="build-half-a-context"),
        pytest.param(OBSERVABLE, "_check_sensor_validity", 1, id="build-sensors"),
        pytest.param(BASE, "_destroy_sim", 1, id="reset-before-freeing"),
        pytest.param(SIMULATION, "free", 1, id="reset-freeing"),
        pytest.param(RENDERER, "__del__", 1, id="reset-in-a-destructor"),
        pytest.param(RENDERER, "_set_mujoco_context_and_buffers", 2, id="reset-half-a-context"),
        pytest.param(BASE, "visualize", 1, id="reset-almost-over"),
        pytest.param(SIMULATION, "free", 2, id="close"),
    ],
)
def test_ctrl_c_around_the_simulator_is_one_line(bundle, owner, name, turn):
    run = ["run", bundle, "--robot", "robosuite:Lift", "--steps", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_CALL, *owner, name, str(turn), *map(str, run)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_deferred_interrupt_arrives_at_the_end_of_the_block():
    finished = []

    def twice():
        with interrupts_deferred():
            with interrupts_deferred():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                finished.append("inner")
            finished.append("outer")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert finished == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts_deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_takes_precedence_over_an_error_of_the_block():
    def fail():
        signal.raise_signal(signal.SIGINT)
        raise ValueError

    with pytest.raises(KeyboardInterrupt) as interrupt, interrupts_deferred():
        fail()
    assert isinstance(interrupt.value.__context__, ValueError)


def test_a_handler_of_the_callers_own_is_the_one_that_is_called():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            assert seen == []
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_has_nothing_to_defer():
    entered = []

    def work():
        with interrupts_deferred():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
