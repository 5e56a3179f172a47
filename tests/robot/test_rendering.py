import ast
import importlib.util
import os
import subprocess
import sys

import pytest

from otau.robot import rendering, simulator
from otau.robot.rendering import choose_renderer
from otau.runtime.errors import MismatchError, MissingDependencyError, UsageError


@pytest.fixture
def opengl(monkeypatch):
    """Set which OpenGL the machine has, and what the environment says."""
    monkeypatch.setenv("MUJOCO_GL", "")
    for name in ("MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"):
        # Set first: deleting what is not there would leave nothing to restore after the test sets it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def have(*, egl=None, osmesa=False, asked=""):
        monkeypatch.setattr(rendering, "_egl_devices", lambda: [] if egl is None else [str(egl)])
        monkeypatch.setattr(rendering, "_loads", lambda library: osmesa and "OSMesa" in library)
        monkeypatch.setenv("MUJOCO_GL", asked)

    return have


def test_egl_comes_first(opengl):
    opengl(egl=1, osmesa=True)
    assert choose_renderer() == "egl"
    assert os.environ["MUJOCO_GL"] == "egl"
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "1"


def test_the_device_of_a_visible_gpu_is_left_to_robosuite(opengl, monkeypatch):
    opengl(egl=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_renderer() == "egl"
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ


def test_a_device_that_is_not_there_is_refused(opengl, monkeypatch):
    opengl(egl=0)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "7")
    with pytest.raises(UsageError, match="no such EGL device"):
        choose_renderer()


def test_osmesa_takes_over_and_says_so(opengl, caplog):
    opengl(osmesa=True)
    assert choose_renderer() == "osmesa"
    assert os.environ["MUJOCO_GL"] == "osmesa"
    assert "OSMesa instead" in caplog.text


def test_what_the_user_asked_for_is_taken_without_a_word(opengl, caplog):
    opengl(egl=0, osmesa=True, asked="osmesa")
    assert choose_renderer() == "osmesa"
    assert not caplog.text


@pytest.mark.parametrize(
    ("have", "package"),
    [
        ({}, "libegl1"),
        ({"osmesa": True, "asked": "egl"}, "libegl1"),
        ({"egl": 0, "asked": "osmesa"}, "libosmesa6"),
    ],
)
def test_a_missing_library_names_its_package(opengl, have, package):
    opengl(**have)
    with pytest.raises(MissingDependencyError) as failure:
        choose_renderer()
    assert f"apt-get install {package}" in failure.value.fix


def test_a_renderer_that_needs_a_screen_is_refused(opengl):
    opengl(egl=0, asked="glfw")
    with pytest.raises(UsageError, match="MUJOCO_GL=glfw"):
        choose_renderer()


def test_the_real_egl_is_asked_without_settling_the_process_on_it():
    code = (
        "from otau.robot import rendering; import sys; print(rendering._egl_devices()); "
        "assert 'OpenGL' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    devices = ast.literal_eval(done.stdout)
    assert devices == sorted(set(devices) & {str(index) for index in range(16)})


def test_without_robosuite_the_fix_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "robosuite", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as failure:
        simulator.import_robosuite()
    assert "make sim" in failure.value.fix
    assert "pip install --no-deps robosuite==1.4.0" in failure.value.fix


def test_another_robosuite_is_refused(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "robosuite", raising=False)
    monkeypatch.setattr(simulator, "require_package", lambda name: tmp_path)
    monkeypatch.setattr(simulator, "version", lambda name: "1.5.2")
    with pytest.raises(MismatchError) as failure:
        simulator.import_robosuite()
    assert (failure.value.expected, failure.value.got) == ("1.4.0", "1.5.2")


@pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed: make sim"
)
def test_robosuite_is_imported_without_a_word():
    code = (
        "import logging; logging.basicConfig(level=logging.WARNING)\n"
        "from otau.robot.simulator import import_robosuite\n"
        "assert import_robosuite().__version__ == '1.4.0'\n"
        "logging.getLogger('robosuite_logs').error('still heard')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == "ERROR:robosuite_logs:still heard\n"
