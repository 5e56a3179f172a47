"""The wheel alone, in an environment that has nothing else: what a robot gets."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "mujoco", "robosuite", "libero")

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and its own requirements."""
    folder = tmp_path_factory.mktemp("lean")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("otau-*.whl")
    venv.create(folder / "venv", with_pip=True)
    bin_folder = folder / "venv" / "bin"
    run(bin_folder / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    return bin_folder


def test_nothing_heavy_is_installed(lean: Path) -> None:
    code = f"import importlib.util as u; print([m for m in {HEAVY!r} if u.find_spec(m)])"
    assert run(lean / "python", "-c", code).stdout.strip() == "[]"
    run(lean / "pip", "check")


def test_every_module_of_the_runtime_imports(lean: Path) -> None:
    code = """
import importlib, json, pkgutil, sys
import otau.runtime
names = [m.name for m in pkgutil.walk_packages(otau.runtime.__path__, "otau.runtime.")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""
    names = json.loads(run(lean / "python", "-W", "error", "-c", code).stdout)
    files = list((ROOT / "runtime" / "otau" / "runtime").rglob("*.py"))
    assert len(names) == len(files) - 1, "all but the package itself"


def test_every_help_shows_an_example(lean: Path) -> None:
    root = run(lean / "otau", "--help").stdout
    verbs = ("compile", "doctor", "infer", "init", "inspect", "run")
    for verb in verbs:
        assert verb in root
        text = run(lean / "otau", verb, "--help").stdout
        assert "Example" in text
        assert "--json" in text
    for script in ("otau-compile", "otau-run"):
        assert "Example" in run(lean / script, "--help").stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["init", "--out", "x"], "otau[training]"),
        (["compile", "x", "-o", "y"], "otau[toolchain]"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(lean: Path, command: list[str], extra: str) -> None:
    done = subprocess.run([lean / "otau", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert extra in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_works_without_anything(lean: Path) -> None:
    facts = json.loads(run(lean / "otau", "doctor", "--json").stdout)
    assert facts
