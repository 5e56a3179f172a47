"""The verbs of the toolchain."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from otau.runtime.dependencies import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otau.toolchain.pipeline import Compilation

__all__ = ["compile_checkpoint"]


def compile_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of an OpenTau checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Where to write the bundle.")],
    target: Annotated[str, typer.Option(metavar="NAME", help="What to compile for: cpu.")] = "cpu",
    num_steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Euler steps of the decoder.", show_default="the checkpoint's"),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with tokenizer.json or tokenizer.model; without one the bundle takes token ids.",
            show_default="the checkpoint's, if it has one",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32.", show_default="the target's first")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compile a checkpoint into a bundle, behind numerical gates.

    A bundle is a folder: three ONNX graphs (prefix, ingest, decoder), normalisation statistics, tokenizer and
    a manifest with the hash of every file. A gate that fails ends with exit code 1 and leaves no bundle.

    Example: otau compile run/checkpoints/000040 --target cpu --out my_bundle
    """
    targets = require("otau.toolchain.targets", extra="toolchain")
    found, precision = targets.find_target(target, precision)
    pipeline = require("otau.toolchain.pipeline", extra="toolchain")
    compilation = pipeline.Compilation(
        source=checkpoint,
        destination=out,
        target=found,
        precision=precision,
        num_steps=num_steps,
        tokenizer=tokenizer,
    )
    try:
        with _progress(len(pipeline.STAGES)) as on_stage:
            pipeline.compile_bundle(compilation, on_stage)
    finally:
        # A failed gate's numbers are worth as much as a passed one's.
        if json_output and compilation.gates:
            typer.echo(json.dumps(compilation.report(), indent=2))
    if not json_output:
        _print(compilation)


@contextmanager
def _progress(stages: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over the stages, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compile", total=stages)

        def on_stage(name: str) -> None:
            started = bar.tasks[0].description != "compile"
            bar.update(task, advance=int(started), description=name)

        yield on_stage


def _print(compilation: Compilation) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    report = compilation.report()
    console = Console()
    gates = Table("gate", "error", "limit", "control failed", title=None)
    for gate in report["gates"]:
        gates.add_row(
            gate["name"],
            f"{gate['value']:.2e}",
            f"{gate['limit']:.0e}",
            "yes" if gate["control_failed"] else "no",
        )
    graphs = Table("graph", "nodes exported", "nodes", "parameters")
    for name, graph in report["graphs"].items():
        graphs.add_row(
            name, str(graph["nodes_exported"]), str(graph["nodes_final"]), f"{graph['parameters']:,}"
        )
    console.print(gates)
    console.print(graphs)
    seconds = sum(stage["seconds"] for stage in report["stages"])
    peak = max(stage["peak_rss_mb"] for stage in report["stages"])
    console.print(
        f"{report['policy']} for {report['target']}, {report['precision']}, {report['num_steps']} steps:"
        f" every gate passed, {seconds:.1f} s, peak {peak:,.0f} MiB",
        markup=False,
    )
    console.print(f"bundle: {report['bundle']}", markup=False)
