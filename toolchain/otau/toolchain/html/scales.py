"""Scales: from values to places in a picture, and the ticks between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from otau.toolchain.html.numbers import is_finite

__all__ = ["LinearScale", "LogScale"]


@dataclass(frozen=True)
class LinearScale:
    """From [low, high] to [start, end], in pixels; values outside go to the nearer end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        if self.high <= self.low:
            return (self.start + self.end) / 2
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def whole_ticks(self, most: int) -> list[int]:
        """At most so many whole numbers, evenly spaced by 1, 2 or 5 times a power of ten."""
        low, high = math.ceil(self.low), math.floor(self.high)
        # A scale's ends may lie between whole numbers, as a cell's edges do.
        spacings = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
        spacing = next(each for each in spacings if high // each + (-low) // each + 1 <= most)
        return list(range(-(-low // spacing) * spacing, high + 1, spacing))


@dataclass(frozen=True)
class LogScale:
    """From [10**low, 10**high] to [start, end], in pixels; values outside go to the nearer end."""

    low: int
    high: int
    start: float
    end: float
    zero: float
    """The place of 0."""

    @classmethod
    def over(cls, values: Iterable[float | None], start: float, end: float, gap: float = 0.0) -> LogScale:
        """The whole decades, at least one, that hold every positive finite value.

        Where a value is 0, its place is `start`, and the decades begin a gap further on.
        """
        values = list(values)
        logs = [math.log10(value) for value in values if is_finite(value) and value > 0]
        low = math.floor(min(logs, default=-1))
        high = max(math.ceil(max(logs, default=0)), low + 1)
        first = start + math.copysign(gap, end - start) if 0 in values else start
        return cls(low, high, first, end, zero=start)

    def __call__(self, value: float | None) -> float:
        """The place of a value; one that is not finite is at the high end."""
        if not is_finite(value):
            return self.end
        if value <= 0:
            return self.zero
        share = min(max((math.log10(value) - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 8) -> list[tuple[float, int]]:
        """Places of at most so many powers of ten, evenly spaced, each with its exponent."""
        step = max(math.ceil((self.high - self.low + 1) / most), 1)
        width = (self.end - self.start) / (self.high - self.low)
        return [
            (self.start + (decade - self.low) * width, decade)
            for decade in range(self.high, self.low - 1, -step)
        ][::-1]
