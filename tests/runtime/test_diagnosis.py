"""What `otau doctor` says where things are missing."""

from __future__ import annotations

import pytest

from otau.runtime import diagnosis
from otau.runtime.dependencies import require
from otau.runtime.errors import MissingDependencyError


@pytest.fixture
def bare_machine(monkeypatch):
    """A machine that has otau's own dependencies and nothing else."""
    real = diagnosis._version
    own = {
        "msgspec",
        "numpy",
        "onnxruntime",
        "rich",
        "safetensors",
        "tokenizers",
        "typer",
        "typing-extensions",
    }
    monkeypatch.setattr(diagnosis, "_version", lambda name: real(name) if name in own else None)
    monkeypatch.setattr(diagnosis, "_output", lambda command: None)


def test_a_bare_machine_can_run_and_is_told_what_else_needs(bare_machine):
    found = diagnosis.diagnose()
    jobs = found["jobs"]
    assert jobs["run a bundle"]["ready"]
    assert jobs["compile"]["missing"].count("torch") == 1
    assert jobs["compile"]["install"] == ["pip install 'otau[toolchain]'"]
    assert {"robosuite", "mujoco", "rendering without a screen"} <= set(jobs["simulate"]["missing"])
    assert jobs["simulate"]["install"][0] == "make sim"
    assert found["facts"]["gpu"] is None
    assert found["facts"]["mujoco rendering"] == dict.fromkeys(("egl", "osmesa"), "mujoco is not installed")


def test_gpus_are_what_nvidia_smi_lists(monkeypatch):
    line = "NVIDIA H200, 570.86.15, 143771 MiB, 9.0"
    monkeypatch.setattr(diagnosis, "_output", lambda command: line if command[0] == "nvidia-smi" else None)
    assert diagnosis._gpus() == [line]


def test_a_renderer_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(diagnosis, "_RENDER", "raise RuntimeError('no display')")
    assert diagnosis._try_rendering("egl") == "RuntimeError: no display"


def test_a_renderer_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(diagnosis, "_RENDER", "import time; time.sleep(60)")
    monkeypatch.setattr(diagnosis, "_SECONDS", 0.5)
    assert diagnosis._try_rendering("egl").startswith("hangs")


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingDependencyError, match=r"pip install 'otau\[toolchain\]'") as caught:
        require("no_such_package.at_all", extra="toolchain")
    assert caught.value.exit_code == 3


def test_a_mistake_in_otau_itself_is_not_called_a_missing_package():
    with pytest.raises(ModuleNotFoundError):
        require("otau.runtime.no_such_module")
