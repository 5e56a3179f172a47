"""`otau verify`: a bundle's gates, repeated where it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from otau.runtime.errors import UsageError
from otau.runtime.messages import printable

__all__ = ["verify"]

_SEED = 2
"""Of new probes; the bundle's own were made with another."""


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of the bundle.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="The checkpoint it was compiled from: PyTorch answers new probes.",
            show_default="the bundle's own probes and answers",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the new probes, with --checkpoint.", show_default=str(_SEED)),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Repeat a bundle's gates on this machine: every gate on the engines.

    The engine that the bundle was compiled for runs its graphs on the probes in the bundle. The results are
    held against the answers in it and the limits of its manifest, with every negative control. That needs
    neither PyTorch nor the checkpoint. With --checkpoint, PyTorch answers new probes instead (extra
    `toolchain`); at full size that takes 13 GB of memory. Exit code 1: a gate failed.

    Example: otau verify my_bundle --json
    """
    from otau.toolchain.gate.parity import refuse_failed
    from otau.toolchain.gate.verify import verify_bundle

    if seed is not None and checkpoint is None:
        raise UsageError("--seed is of new probes", where="--seed", fix="give --checkpoint CHECKPOINT, too")
    with _progress() as on_stage:
        found = verify_bundle(bundle, checkpoint, _SEED if seed is None else seed, on_stage)
    document = {
        "bundle": str(bundle),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        **found.document(),
    }
    if json_output:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print(document)
    refuse_failed(found.gates, "do not run this bundle on a robot")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, on a terminal only."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status("verify") as status:
        yield status.update


def _print(document: dict[str, Any]) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("gate", "error", "limit", "headroom", "when compiled", "control failed")
    for gate in document["gates"]:
        headroom, before = gate["headroom"], gate["when_compiled"]
        table.add_row(
            gate["name"],
            Text(f"{gate['value']:.2e}", style="" if gate["passed"] else "bold red"),
            f"{gate['limit']:.1e}",
            "exact" if headroom is None else f"{headroom:.2g} x",
            "" if before is None else f"{before:.2e}",
            "yes" if gate["control_failed"] else "NO",
        )
    console = Console()
    console.print(table)
    for metric in dict.fromkeys(gate["metric"] for gate in document["gates"]):
        names = ", ".join(gate["name"] for gate in document["gates"] if gate["metric"] == metric)
        console.print(f"{names}: {metric}", markup=False)
    ran = ", ".join(f"{graph} on {provider}" for graph, provider in document["providers"].items())
    console.print(printable(f"{document['engine']} ran {ran}"), markup=False)
    verdict = "every gate passed" if document["passed"] else "NOT the policy that it was compiled from"
    of = f"{document['policy']} for {document['target']}, {document['precision']}"
    console.print(printable(f"{of}, {document['num_steps']} steps: {verdict}"), markup=False)
