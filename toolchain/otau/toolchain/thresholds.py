"""The limits of every gate, in one table."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["THRESHOLDS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Largest errors of a precision, relative to the reference's scale (max |reference|, at least 1)."""

    cache: float
    """On K and V of any layer."""
    actions: float
    """On the action chunk."""


THRESHOLDS = {"fp32": Limits(cache=1e-5, actions=2e-6)}
"""Limits by precision."""
