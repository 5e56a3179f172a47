"""Engines by name, each imported only when it is asked for."""

from __future__ import annotations

from typing import cast

from otau.runtime.dependencies import require
from otau.runtime.engines.base import Engine, ResidentTensor
from otau.runtime.errors import UsageError, nearest_name

__all__ = ["ENGINES", "Engine", "ResidentTensor", "engine_class"]

ENGINES = {"onnxruntime": "otau.runtime.engines.onnxruntime:OnnxRuntimeEngine"}
"""Name in a manifest -> where the class is."""


def engine_class(name: str) -> type[Engine]:
    """The class of an engine.

    Raises:
        UsageError: No engine has that name; the nearest one is offered.
        MissingDependencyError: The package that it runs on is not installed.
    """
    if name not in ENGINES:
        raise UsageError("there is no such engine", got=name, fix=nearest_name(name, ENGINES))
    module, _, attribute = ENGINES[name].partition(":")
    return cast("type[Engine]", getattr(require(module), attribute))
