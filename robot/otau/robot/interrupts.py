"""Keeping Ctrl-C out of code that does not survive it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interrupts_deferred"]


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back while the block runs, and deliver it when the block is left.

    Cut halfway, robosuite leaves objects whose destructors fail, and `MjSim.free` cannot be called
    again. Python swallows a KeyboardInterrupt within a destructor, and with it the user's wish. So what
    builds, resets or frees a simulation, a matter of seconds, is not cut at all. A second Ctrl-C waits too.

    Only the main thread gets signals; in others this does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    received: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            previous(signal.SIGINT, received[0])
