"""Scoped monkey patches for the ONNX export, in one registry.

A patch is the last resort, where an installed library cannot be exported as it is. Each says why, names the
upstream issue, and has a test that fails without it; one that proves unneeded is deleted. With torch 2.13
and transformers 5.23 both policies export as they are, so the registry is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

__all__ = ["PATCHES", "Patch", "applied"]


@dataclass(frozen=True)
class Patch:
    """One attribute replaced while a graph is exported."""

    owner: Any
    """The module or class that has the attribute."""
    attribute: str
    replacement: Any
    reason: str
    upstream: str
    """The issue to watch: when it is closed, the patch goes."""


PATCHES: tuple[Patch, ...] = ()


@contextmanager
def applied(patches: Sequence[Patch] = PATCHES) -> Iterator[None]:
    """Apply patches, and undo them all on the way out, an exception or not.

    Raises:
        AttributeError: A patch names an attribute that its owner does not have (any more).
    """
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(patch.owner, patch.attribute, patch.replacement))
        yield
