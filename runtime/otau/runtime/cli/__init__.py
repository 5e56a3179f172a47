"""The command `otau <verb>`; verbs are entry points of the group `otau.verbs`."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Annotated, Any

import typer

from otau.runtime.errors import MissingDependencyError, OtauError, UsageError, nearest_name

__all__ = ["alias", "main"]

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as the shell has it: 128 + SIGINT."""


def main() -> None:
    """The console script `otau`: loads the verb that is called, or all of them to list them."""
    _start_logging()
    verbs = {entry.name: entry for entry in entry_points(group="otau.verbs")}
    called = sys.argv[1] if len(sys.argv) > 1 else ""
    if called and not called.startswith("-") and called not in verbs:
        _fail(UsageError("otau has no such verb", got=called, fix=nearest_name(called, verbs)))
    app = _application("otau")
    app.callback(epilog="`otau VERB --help` has an example of each.")(_root)
    for name in [called] if called in verbs else sorted(verbs):
        app.command(name)(_guarded(verbs[name]))
    app(prog_name="otau")


def alias() -> None:
    """The console scripts `otau-<verb>`: the verb is in the name that the script was called by."""
    _start_logging()
    script = Path(sys.argv[0]).name
    verb = script.removeprefix("otau-")
    (entry,) = entry_points(group="otau.verbs", name=verb)
    app = _application(script)
    app.command(verb)(_guarded(entry))
    app(prog_name=script)


def _application(name: str) -> typer.Typer:
    # Plain help: markup would eat units in brackets, and break lines where the source does.
    return typer.Typer(
        name=name,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"otau {version('otau')}")
        raise typer.Exit


def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Compile vision-language-action policies into bundles and run the bundles on robots."""


def _guarded(entry: EntryPoint) -> Callable[..., Any]:
    """The verb's function, its errors turned into a message and an exit code."""
    function = _load(entry)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except OtauError as error:
            _fail(error)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            sys.exit(_INTERRUPTED)

    return guarded


def _load(entry: EntryPoint) -> Callable[..., Any]:
    """The function behind a verb; for a plug-in that cannot be imported, one that says so.

    The help of `otau` must list every verb, also where one plug-in is broken.
    """
    try:
        function: Callable[..., Any] = entry.load()
    except (ImportError, AttributeError) as error:
        problem = MissingDependencyError(
            f"the verb {entry.name!r} cannot be loaded",
            where=entry.value,
            got=error,
            fix="reinstall otau, or the plug-in that brings the verb",
        )

        def unavailable() -> None:
            raise problem

        unavailable.__doc__ = f"Cannot be loaded: {error}."
        return unavailable
    return function


def _fail(error: OtauError) -> None:
    """Prints the message, without a traceback, and exits with the code of its class."""
    typer.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def _start_logging() -> None:
    """Warnings go to stderr: stdout is for results."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
