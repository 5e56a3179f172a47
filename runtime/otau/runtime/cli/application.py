"""The command line of `otau` and its verbs, made with typer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer

from otau.runtime.errors import MissingDependencyError, UsageError, nearest_name

__all__ = ["run_otau", "run_verb"]


def run_otau() -> None:
    """Runs `otau <verb>`: loads the verb that is called, or all of them to list them.

    Raises:
        UsageError: There is no such verb.
        SystemExit: When done, and for what typer itself refuses.
    """
    verbs = {entry.name: entry for entry in entry_points(group="otau.verbs")}
    called = sys.argv[1] if len(sys.argv) > 1 else ""
    if called and not called.startswith("-") and called not in verbs:
        raise UsageError("otau has no such verb", got=called, fix=nearest_name(called, verbs))
    app = _application("otau")
    app.callback(epilog="`otau VERB --help` has an example of each.")(_root)
    for name in [called] if called in verbs else sorted(verbs):
        app.command(name)(_load(verbs[name]))
    app(prog_name="otau")


def run_verb(verb: str, script: str) -> None:
    """Runs one verb as a command of its own.

    Args:
        verb: Its name.
        script: What the command is called.

    Raises:
        SystemExit: When done, and for what typer itself refuses.
    """
    (entry,) = entry_points(group="otau.verbs", name=verb)
    app = _application(script)
    app.command(verb)(_load(entry))
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
