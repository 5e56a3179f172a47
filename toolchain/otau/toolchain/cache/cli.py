"""The verb `cache`."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from otau.runtime.errors import UsageError

__all__ = ["cache"]

_DAY_S = 24 * 3600


def cache(
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove results; without an age, all of them.")
    ] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="DAYS", help="With --prune: only results older than this.", show_default="all"
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Folder of the compile cache.",
            show_default="$OTAU_CACHE or ~/.cache/otau",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the compile cache, or prune it.

    It holds the results of each stage of `otau compile` by what they were made from. A bundle shares its
    files with the cache where both are on one file system; pruning never touches a bundle.

    Example: otau cache --prune --older-than 7
    """
    from otau.toolchain.cache.store import CompileCache, default_root

    if older_than is not None and not prune:
        raise UsageError(
            "an age was given, but nothing is to be removed", where="--older-than", fix="add --prune"
        )
    if folder is not None and not folder.is_dir():
        raise UsageError("there is no such cache folder", where=f"--cache {folder}", fix="check the path")
    found = CompileCache(folder or default_root())
    document = _prune(found, older_than or 0.0) if prune else _show(found)
    if json_output:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print(document)


def _show(found: Any) -> dict[str, Any]:
    pairs = [*found.entries(), *((draft, None) for draft in found.drafts())]
    return {"cache": str(found.root), "entries": [_describe(*pair) for pair in pairs]}


def _prune(found: Any, days: float) -> dict[str, Any]:
    if not found.root.is_dir():
        return {"cache": str(found.root), "removed": [], "entries": []}
    removed = []
    with found.in_use(alone=True):
        for path, entry in found.entries():
            if entry is None or entry.created <= time.time() - days * _DAY_S:
                removed.append(_describe(path, entry))
                found.remove(path)
        # Nobody works in them: the cache is held alone.
        for draft in found.drafts():
            removed.append(_describe(draft, None))
            found.remove(draft)
        found.forget()
    return {**_show(found), "removed": removed}


def _describe(path: Path, entry: Any) -> dict[str, Any]:
    if entry is None:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return {"name": path.name, "stage": None, "bytes": size, "created": None, "seconds": None}
    return {
        "name": path.name,
        "stage": entry.stage,
        "bytes": entry.bytes,
        "created": entry.created,
        "seconds": entry.seconds,
    }


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = document.get("removed", document["entries"])
    table = Table("removed" if "removed" in document else "stage", "size", "made", "took")
    for entry in shown:
        size = f"{entry['bytes'] / 1e6:,.1f} MB"
        if entry["stage"] is None:
            table.add_row(f"{entry['name']} (unfinished or damaged)", size, "", "")
            continue
        made = datetime.fromtimestamp(entry["created"]).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry["stage"], size, made, f"{entry['seconds']:,.1f} s")
    if shown:
        console.print(table)
    total = sum(entry["bytes"] or 0 for entry in document["entries"])
    console.print(
        f"{document['cache']}: {len(document['entries'])} results, {total / 1e9:,.2f} GB", markup=False
    )
