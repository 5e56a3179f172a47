"""Texts and numbers that somebody else wrote, as a message may have them: printable, and not all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MAX_CHARACTERS", "excerpt", "printable", "shortened"]

MAX_CHARACTERS = 500
"""Longest part of an error."""
_MAX_NUMBERS = 16


def printable(text: str) -> str:
    r"""The text with `\x1b` and such for what a terminal would obey or could not show; `\n` and `\t` stay.

    Besides control characters these are those that reorder text, lone surrogates, and all spaces but one.
    """
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def shortened(text: str) -> str:
    """The text, cut where it is longer than `MAX_CHARACTERS`."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}... ({len(text):,} characters)"


def excerpt(values: np.ndarray) -> str:
    """An array in words: its values, where they are few."""
    if values.size <= _MAX_NUMBERS:
        return str(values.tolist())
    return f"{values.size:,} numbers, first {values.reshape(-1)[:_MAX_NUMBERS].tolist()}"
