"""The error tree of otau and its exit codes.

    OtauError
    ├── CheckError            1   a gate or check failed
    │   ├── GateError             a compiled stage is not what it was compiled from
    │   ├── CheckpointError       a checkpoint's contents are not those of its policy
    │   └── BundleError           a bundle is damaged: hash, size, missing or escaping file
    ├── UsageError            2   the command asks for something that is not there or not possible
    ├── MismatchError         3   this environment, engine or robot does not fit the bundle
    │   ├── MissingDependencyError
    │   └── EngineError
    └── LinkError             4   the link to the prefix server failed

A message says what is wrong, where, what was expected and what was found, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from otau.runtime.messages import shortened

__all__ = [
    "BundleError",
    "CheckError",
    "CheckpointError",
    "EngineError",
    "GateError",
    "LinkError",
    "MismatchError",
    "MissingDependencyError",
    "OtauError",
    "UsageError",
    "nearest_name",
]


class OtauError(Exception):
    """Base of every error that otau raises on purpose.

    Args:
        what: One sentence, the thing that is wrong.
        where: The file, key, tensor or flag it was found in.
        expected: What would have been right.
        got: What was found instead.
        fix: What the user can do now.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        """Keep the parts apart, so that `--json` and a terminal can show them their own way."""
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.fix = fix
        super().__init__(str(self))

    def parts(self) -> dict[str, str]:
        """The message as a mapping, without the parts that were not given; long ones are cut."""
        named = {
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "fix": self.fix,
        }
        return {name: shortened(str(value)) for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        """The message, a line a part."""
        parts = self.parts()
        lines = [parts.pop("what")]
        lines += [f"  {name + ':':<10}{text}" for name, text in parts.items()]
        return "\n".join(lines)


class CheckError(OtauError):
    """A gate or check failed."""

    exit_code = 1


class GateError(CheckError):
    """A compiled stage differs from the one before it by more than its limit."""


class CheckpointError(CheckError):
    """A checkpoint's contents are not those of its policy."""


class BundleError(CheckError):
    """A bundle is damaged: a hash, a size, a missing or an escaping file."""


class UsageError(OtauError):
    """The command or call asks for something that is not there or not possible."""

    exit_code = 2


class MismatchError(OtauError):
    """This environment, engine or robot does not fit the bundle."""

    exit_code = 3


class MissingDependencyError(MismatchError):
    """A package or system library needed for this job is not installed."""


class EngineError(MismatchError):
    """An engine could not be opened, or is not the one asked for."""


class LinkError(OtauError):
    """The link to the prefix server failed."""

    exit_code = 4


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """The hint for an unknown name: the nearest valid one, else all of them.

    Args:
        name: What was given.
        valid: The names that would have been accepted.

    Returns:
        A sentence to use as an error's `fix`.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? Valid names: {', '.join(names)}"
    return f"valid names: {', '.join(names)}" if names else "no name is valid here"
