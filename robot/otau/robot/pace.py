"""Keeping a control rate against the clock of the wall."""

from __future__ import annotations

import math
import time

__all__ = ["Pace"]


class Pace:
    """Deadlines at start + k / rate on the monotonic clock, so that errors do not add up.

    A tick that took too long is counted as late, and the deadlines it missed are skipped: catching up
    would send a robot several actions at once.
    """

    def __init__(self, rate: float) -> None:
        """The first deadline is one period from now.

        Args:
            rate: Ticks a second [Hz].
        """
        self._rate = rate
        self._start = time.monotonic()
        self._next = 1
        self.late = 0
        """Ticks that missed their deadline so far."""

    def wait(self) -> None:
        """Sleep until the deadline of this tick."""
        passed = (time.monotonic() - self._start) * self._rate
        if passed > self._next:
            self.late += 1
            self._next = math.floor(passed) + 1
            return
        time.sleep((self._next - passed) / self._rate)
        self._next += 1
