"""Runs a bundle: the part of otau that is on the robot."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otau.runtime.bundle import Bundle
    from otau.runtime.errors import OtauError
    from otau.runtime.observation import Observation
    from otau.runtime.policy import ActionChunk, Policy
    from otau.runtime.prefix import KVCache

__all__ = ["ActionChunk", "Bundle", "KVCache", "Observation", "OtauError", "Policy"]

_HOMES = {
    "ActionChunk": "otau.runtime.policy",
    "Bundle": "otau.runtime.bundle",
    "KVCache": "otau.runtime.prefix",
    "Observation": "otau.runtime.observation",
    "OtauError": "otau.runtime.errors",
    "Policy": "otau.runtime.policy",
}
"""The module of each public name, imported when the name is first asked for: the command line is in this
package too, and must catch signals before anything as slow as numpy is loaded."""


def __getattr__(name: str) -> object:
    """Imports a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names that are here, asked for yet or not."""
    return sorted({*globals(), *__all__})
