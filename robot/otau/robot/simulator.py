"""Importing robosuite: with a renderer that works, without its chatter, with a reason where it fails."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from otau.robot.interrupts import interrupts_deferred
from otau.robot.rendering import choose_renderer
from otau.runtime.errors import MismatchError, MissingDependencyError

__all__ = ["import_robosuite", "require_package", "seeded"]

_INSTALL = (
    "make sim, or: pip install 'otau[libero]' "
    "&& pip install --no-deps robosuite==1.4.0 hf-libero==0.1.4 bddl==1.0.1"
)


def import_robosuite() -> ModuleType:
    """The `robosuite` package, ready to draw.

    Raises:
        MissingDependencyError: robosuite, one of its packages or OpenGL is not installed.
        MismatchError: It is another robosuite than 1.4.
    """
    if "robosuite" in sys.modules:
        return sys.modules["robosuite"]
    package = require_package("robosuite")
    found = version("robosuite")
    if not found.startswith("1.4."):
        raise MismatchError("this robosuite does not fit", expected="1.4.0", got=found, fix=_INSTALL)
    choose_renderer()
    _quieten(package)
    # Deferred: a bare `except` in its wrappers swallows Ctrl-C.
    with interrupts_deferred(), warnings.catch_warnings():
        # Its __init__ logs with the deprecated Logger.warn.
        warnings.filterwarnings("ignore", "The 'warn' method is deprecated", DeprecationWarning)
        try:
            return importlib.import_module("robosuite")
        except ImportError as error:
            raise MissingDependencyError(
                "robosuite does not import", where=package, got=error, fix=_INSTALL
            ) from error


def require_package(name: str) -> Path:
    """The folder of a simulator's package, without importing it.

    Args:
        name: `robosuite` or `libero`.

    Returns:
        The folder that holds its `__init__.py`.

    Raises:
        MissingDependencyError: It is not installed; the message says how to install it.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise MissingDependencyError(f"the package {name!r} is not installed", fix=_INSTALL)
    return Path(found.origin).parent


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the global random streams, which robosuite and LIBERO draw from, and restore them after.

    Args:
        seed: None leaves the streams as they are.
    """
    if seed is None:
        yield
        return
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # all that this stream takes
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _quieten(package: Path) -> None:
    """Load robosuite's settings ahead of robosuite, and turn its log down to errors.

    While being imported it logs three warnings about an optional file, and opens /tmp/robosuite.log,
    which fails where another user owns that file. Its settings are read then, and only then.
    """
    name = "robosuite.macros"
    spec = importlib.util.spec_from_file_location(name, package / "macros.py")
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.CONSOLE_LOGGING_LEVEL = None
    sys.modules[name] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
