"""The command `otau <verb>`; verbs are entry points of the group `otau.verbs`.

This module imports little, so that a signal finds its handlers in place almost from the start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from otau.runtime.errors import OtauError
from otau.runtime.messages import printable

__all__ = ["alias", "main"]

_FIRST_SIGNAL_CODE = 128
"""A shell's exit code for a command that a signal ended is this plus the signal's number."""


def main() -> None:
    """The console script `otau`."""

    def start() -> None:
        from otau.runtime.cli.application import run_otau

        run_otau()

    _run(start)


def alias() -> None:
    """The console scripts `otau-<verb>`: the verb is in the name that the script was called by."""

    def start() -> None:
        from otau.runtime.cli.application import run_verb

        script = Path(sys.argv[0]).name
        run_verb(script.removeprefix("otau-"), script)

    _run(start)


def _run(start: Callable[[], None]) -> None:
    """Runs a command, and turns errors and signals into a message and an exit code."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        """Raises, so that open blocks are left and temporary directories removed."""
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(_FIRST_SIGNAL_CODE + number)

    # What the parent ignores (as a shell does for a background job) stays ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    try:
        for number in numbers:
            signal.signal(number, stop)
        _start_logging()
        if isinstance(sys.stdout, TextIOWrapper):
            # A name that cannot be encoded, from whatever file, is no reason to fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        _run_and_flush(start)
    except BaseException as error:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        # An import that is interrupted may end in another error, or in typer's own words.
        if received and not (isinstance(error, SystemExit) and not error.code):
            if received[0] == signal.SIGINT:
                print("interrupted", file=sys.stderr)
            sys.exit(_FIRST_SIGNAL_CODE + received[0])
        if _is_closed_pipe(error):
            # Nobody reads any more: the interpreter must not try to flush the rest either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(_FIRST_SIGNAL_CODE + signal.SIGPIPE)
        if isinstance(error, OtauError):
            print(printable(f"error: {error}"), file=sys.stderr)
            sys.exit(error.exit_code)
        raise


def _run_and_flush(start: Callable[[], None]) -> None:
    """Runs a command; what it printed is written now, while a failure can still be handled."""
    try:
        start()
    except SystemExit:
        if sys.stdout is not None:
            sys.stdout.flush()
        raise


def _is_closed_pipe(error: BaseException) -> bool:
    """Whether the reader of the output went away; rich and typer turn that into an exit with code 1."""
    if isinstance(error, SystemExit):
        return error.code == 1 and isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError)


def _start_logging() -> None:
    """Warnings go to stderr: stdout is for results."""
    import logging

    class PrintableFormatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
