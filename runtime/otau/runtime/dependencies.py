"""Packages that only some jobs need, imported when such a job starts."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from otau.runtime.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, *, extra: str | None = None) -> ModuleType:
    """Imports a module, or says what to install for it.

    Args:
        module: Its full name, for example "torch" or a module of otau that imports torch.
        extra: The extra of otau that brings the package; None: otau's own dependencies do.

    Raises:
        MissingDependencyError: The module, or one that it imports, is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        # A module of otau's own that is not there is a mistake in otau, not in the installation.
        if error.name is not None and error.name.partition(".")[0] == "otau":
            raise
        package = f"otau[{extra}]" if extra else "otau"
        raise MissingDependencyError(
            f"{error.name or module} is needed for this and cannot be imported",
            got=error,
            fix=f"pip install '{package}'",
        ) from error
