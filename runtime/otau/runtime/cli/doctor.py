"""`otau doctor`: what is installed, what is missing for which job, and how to get it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["doctor"]


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, hardware, and what is missing for which job.

    Rendering is tried in a process of its own, which takes a few seconds. Paste the output of --json
    into a bug report.

    Example: otau doctor --json
    """
    from otau.runtime.diagnosis import diagnose

    diagnosis = diagnose()
    if json_output:
        typer.echo(json.dumps(diagnosis, indent=2))
    else:
        _print(diagnosis)


def _print(diagnosis: dict[str, Any]) -> None:
    """The diagnosis for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, value in diagnosis["facts"].items():
        facts.add_row(name, Text(_worded(value)))
    console.print(facts)
    jobs = Table("job", "ready", "missing", "to install")
    for name, job in diagnosis["jobs"].items():
        jobs.add_row(
            name,
            "yes" if job["ready"] else "no",
            Text(", ".join(job["missing"])),
            Text("\n".join(job["install"])),
        )
    console.print(jobs)


def _worded(value: Any) -> str:
    """A fact as text: null is "none"; lists and mappings become commas."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_worded(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_worded(item) for item in value) or "none"
    return "none" if value is None else str(value)
