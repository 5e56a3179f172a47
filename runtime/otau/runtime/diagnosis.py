"""The facts that a bug report needs, and what is missing for which job.

Versions come from the installed packages' metadata; nothing heavy is imported into this process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["diagnose"]

_PACKAGES = (
    "numpy",
    "msgspec",
    "safetensors",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "onnxscript",
    "torch",
    "transformers",
    "tensorrt",
    "tensorrt_rtx",
    "openvino",
    "mujoco",
    "robosuite",
    "hf-libero",
)
_SIMULATORS = ("robosuite", "hf-libero", "bddl")
"""Installed without their own dependencies, so no extra can list them."""

_RENDERERS = {"egl": "apt-get install libegl1 libgl1-mesa-dri", "osmesa": "apt-get install libosmesa6"}
"""Back end of MuJoCo's rendering -> how to install it."""

_RENDER = """
import mujoco
world = '<light pos="0 0 3"/><geom type="sphere" size="1" rgba="1 0 0 1"/>'
model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{world}</worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the picture is black"
"""

_SECONDS = 60
"""How long a program that is asked may take [s]."""


def diagnose() -> dict[str, Any]:
    """What is here, and what is missing.

    Returns:
        `facts`: name -> text, list or mapping, None where a thing is not here; `jobs`: name ->
        {`ready`, `missing`: names, `install`: commands}.
    """
    rendering = _rendering()
    facts = {
        "otau": version("otau"),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": {name: _version(name) for name in _PACKAGES},
        "onnxruntime providers": _onnxruntime_providers(),
        "cuda": {"torch built for": _torch_cuda(), "toolkit": _cuda_toolkit()},
        "tensorrt libraries": _debian_version("libnvinfer10") or _debian_version("libnvinfer8"),
        "gpu": _gpus(),
        "jetpack": _jetpack(),
        "mujoco rendering": rendering,
    }
    return {"facts": facts, "jobs": _jobs(rendering)}


def _jobs(rendering: dict[str, str]) -> dict[str, Any]:
    """What is missing for each job, and the commands that bring it."""
    run = _missing(_requirements(None))
    compile_ = _missing(_requirements("toolchain"))
    train = _missing(_requirements("training"))
    simulate = _missing([*_requirements("libero"), *_SIMULATORS])
    install = ["make sim"] if simulate else []
    if "works" not in rendering.values():
        simulate = [*simulate, "rendering without a screen"]
        install.append(_RENDERERS["egl"])
    return {
        "run a bundle": _job(run, ["pip install otau"]),
        "compile": _job(compile_, ["pip install 'otau[toolchain]'"]),
        "train": _job(train, ["pip install 'otau[training]'"]),
        "simulate": _job(simulate, install),
    }


def _job(missing: list[str], install: list[str]) -> dict[str, Any]:
    return {"ready": not missing, "missing": missing, "install": install if missing else []}


def _requirements(extra: str | None) -> list[str]:
    """Names of the packages that otau, or one of its extras, declares."""
    names = []
    for line in requires("otau") or []:
        marker = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if name and (marker.group(1) if marker else None) == extra:
            names.append(name.group())
    return names


def _missing(packages: list[str]) -> list[str]:
    return [name for name in packages if _version(name) is None]


def _version(package: str) -> str | None:
    """The installed version of a package; ONNX Runtime's GPU package stands in for the plain one."""
    names = (package, "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _onnxruntime_providers() -> list[str] | str | None:
    if find_spec("onnxruntime") is None:
        return None
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        return f"cannot be imported: {error}"
    return [str(provider) for provider in onnxruntime.get_available_providers()]


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda[^=\n]*= *'([^']*)'", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found.group(1) if found else None


def _cuda_toolkit() -> str | None:
    output = _output(["nvcc", "--version"])
    found = re.search(r"release ([\d.]+)", output or "")
    return found.group(1) if found else None


def _gpus() -> list[str] | None:
    """Name, driver, memory and compute capability of every GPU that nvidia-smi sees."""
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    output = _output(["nvidia-smi", query, "--format=csv,noheader"])
    return output.splitlines() if output else None


def _jetpack() -> str | None:
    """The release of Jetson Linux, and the JetPack package where it is installed."""
    file = Path("/etc/nv_tegra_release")
    release = file.read_text().splitlines()[:1] if file.is_file() else []
    package = _debian_version("nvidia-jetpack")
    parts = [*release, f"nvidia-jetpack {package}"] if package else release
    return "; ".join(parts) or None


def _debian_version(package: str) -> str | None:
    return _output(["dpkg-query", "--show", "--showformat=${Version}", package]) or None


def _rendering() -> dict[str, str]:
    """For each back end of MuJoCo, `works` or what went wrong, tried in processes of their own."""
    if _version("mujoco") is None:
        return dict.fromkeys(_RENDERERS, "mujoco is not installed")
    return {backend: _try_rendering(backend) for backend in _RENDERERS}


def _try_rendering(backend: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            env={**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"hangs: nothing after {_SECONDS} s"
    if done.returncode == 0:
        return "works"
    last = done.stderr.strip().splitlines()[-1:]
    return last[0] if last else f"exit code {done.returncode}"


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is not here or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
