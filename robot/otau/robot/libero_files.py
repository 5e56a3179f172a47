"""Where LIBERO keeps its things: importing it without a question, its assets, its initial states.

hf-libero carries code, task definitions and initial states. Meshes and textures ("assets") come from
the hub, once, or from a folder of the user's.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import importlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from otau.robot.interrupts import interrupts_deferred
from otau.robot.simulator import import_robosuite, require_package
from otau.runtime.errors import MismatchError, MissingDependencyError, UsageError

__all__ = ["ASSETS_REPOSITORY", "ASSETS_VARIABLE", "import_libero", "libero_assets", "load_init_states"]

ASSETS_REPOSITORY = "lerobot/libero-assets"
"""Data set on the hub that holds the original assets."""

ASSETS_VARIABLE = "OTAU_LIBERO_ASSETS"
"""Environment variable that names a folder of assets."""

_ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_scanned_objects", "turbosquid_objects")

_LOG = logging.getLogger(__name__)


def import_libero(assets: Path) -> ModuleType:
    """The `libero.libero` package, drawing from these assets, without its question on stdin.

    Args:
        assets: Folder of assets, from `libero_assets`.

    Raises:
        MissingDependencyError: LIBERO, robosuite or OpenGL is not installed.
        MismatchError: The user's cache cannot be written.
    """
    import_robosuite()
    package = require_package("libero")
    with interrupts_deferred(), _config(package / "libero"):
        try:
            libero = importlib.import_module("libero.libero")
            importlib.import_module("libero.libero.benchmark")
            importlib.import_module("libero.libero.envs")
        except ImportError as error:
            raise MissingDependencyError(
                "LIBERO does not import", where=package, got=error, fix="make sim"
            ) from error
    # The folder it found last is the only thing it consults that can be set: it ignores its config here.
    libero._assets_path_cache = str(assets)
    return libero


def libero_assets(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of LIBERO's meshes and textures; fetched from the hub where there is none yet.

    Looked for in this order: `folder`, `$OTAU_LIBERO_ASSETS`, inside the installed package,
    `~/.cache/libero/assets` (where hf-libero itself keeps them), the hub.

    Args:
        folder: A folder of one's own, or None.

    Returns:
        A folder with `scenes`, `articulated_objects`, ...

    Raises:
        UsageError: The folder named is not one of assets.
        MissingDependencyError: There are none here and the hub cannot be reached.
    """
    named = folder or os.environ.get(ASSETS_VARIABLE)
    if named:
        path = Path(named).expanduser().resolve()
        missing = [name for name in _ASSET_FOLDERS if not (path / name).is_dir()]
        if missing:
            raise UsageError(
                "this is no folder of LIBERO assets",
                where=path,
                expected=f"the folders {', '.join(_ASSET_FOLDERS)}",
                got=f"no {', '.join(missing)}",
                fix=f"name the folder that holds them, or unset {ASSETS_VARIABLE} to fetch the originals",
            )
        return path
    cached = Path.home() / ".cache/libero/assets"
    for path in (require_package("libero") / "libero/assets", cached):
        if all((path / name).is_dir() for name in _ASSET_FOLDERS):
            return path
    return _fetch(cached)


def load_init_states(path: Path) -> np.ndarray:
    """Read the initial states of a task, without running what a pickle may ask to run.

    Args:
        path: A `.pruned_init` file of LIBERO: a NumPy array saved by `torch.save`.

    Returns:
        (episodes, states) float64, flattened MuJoCo states: time, positions, velocities.

    Raises:
        UsageError: The file is something else, or holds anything but an array.
    """
    import torch

    allowed = [
        # The files were written by NumPy 1, under the module's old name.
        (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
        codecs.encode,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            states = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        reason = str(error).splitlines()[0]
        raise UsageError(
            "the initial states cannot be read", where=path, got=reason, fix="make sim"
        ) from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype != np.float64:
        raise UsageError(
            "the initial states are not an array",
            where=path,
            expected="(n, states) float64",
            got=type(states),
        )
    return states


@contextlib.contextmanager
def _config(package: Path) -> Iterator[None]:
    """Have LIBERO find a configuration while it is being imported; without one it asks on stdin.

    The file lies in the user's cache, one a LIBERO installation, and is the one it would write itself.
    A configuration of the user's own for another copy of LIBERO is neither read nor changed.
    """
    import yaml

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "otau" / f"libero-{hashlib.sha256(str(package).encode()).hexdigest()[:12]}"
    content = {
        "benchmark_root": str(package),
        "bddl_files": str(package / "bddl_files"),
        "init_states": str(package / "init_files"),
        "datasets": str(folder / "datasets"),
        "assets": str(package / "assets"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as part:
            yaml.safe_dump(content, part)
        os.replace(part.name, folder / "config.yaml")
    except OSError as error:
        raise MismatchError(
            "LIBERO's configuration cannot be written",
            where=folder,
            got=error,
            fix="set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    before = os.environ.get("LIBERO_CONFIG_PATH")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBERO_CONFIG_PATH"]
        else:
            os.environ["LIBERO_CONFIG_PATH"] = before


def _fetch(folder: Path) -> Path:
    """Download the original assets, under another name until they are complete.

    hf-libero's own function does not work with huggingface_hub 1 and later, which dropped an argument
    it passes, and takes an interrupted download for a complete one.
    """
    part = folder.with_name(folder.name + ".part")
    _LOG.warning("fetching the LIBERO assets (%s) to %s, once", ASSETS_REPOSITORY, folder)
    try:
        from huggingface_hub import snapshot_download

        snapshot_download(ASSETS_REPOSITORY, repo_type="dataset", local_dir=part)
    except Exception as error:  # of huggingface_hub, its HTTP client or the file system: no common base
        raise MissingDependencyError(
            "LIBERO's assets are not here and cannot be fetched",
            where=f"{ASSETS_REPOSITORY} -> {folder}",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            fix=f"connect to the network once, or name a folder: --libero-assets DIR or {ASSETS_VARIABLE}",
        ) from error
    os.replace(part, folder)
    return folder
