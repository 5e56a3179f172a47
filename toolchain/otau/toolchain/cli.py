"""The compiler's verb."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from otau.runtime.dependencies import require
from otau.runtime.errors import UsageError, nearest_name

__all__ = ["compile_checkpoint"]


def compile_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint, of any format otau reads.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Where to write the bundle.")],
    target: Annotated[str, typer.Option(metavar="NAME", help="What to compile for: cpu.")] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How weights are stored: fp32, bf16 or fp16. The cpu computes in fp32 with each.",
            show_default="the target's first",
        ),
    ] = None,
    num_steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Euler steps of the decoder.", show_default="the checkpoint's"),
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(metavar="NAME", help="How one graph holds all steps: loop or unrolled."),
    ] = "loop",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with tokenizer.json or tokenizer.model; without one the bundle takes token ids.",
            show_default="the checkpoint's, if it has one",
        ),
    ] = None,
    norm_head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The robot's row of the normalisation statistics: name or number.",
            show_default="all",
        ),
    ] = None,
    action_dims: Annotated[
        int | None,
        typer.Option(min=1, help="True width of the actions.", show_default="the checkpoint's"),
    ] = None,
    state_dims: Annotated[
        int | None,
        typer.Option(min=1, help="True width of the state.", show_default="the checkpoint's"),
    ] = None,
    absent_camera: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A camera that the robot does not have; may be given again."),
    ] = None,
    without_response: Annotated[
        bool,
        typer.Option("--without-response", help="Leave out the response a policy writes before it acts."),
    ] = False,
    allow: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="seed: bf16 and fp16 may be off by half the distance of two noise seeds.",
            show_default="the bf16 noise floor",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the compile cache.", show_default="$OTAU_CACHE or ~/.cache/otau"
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compile a checkpoint into a bundle, behind numerical gates.

    A bundle is a folder: ONNX graphs (prefix, ingest, decoder, one decoder step), normalisation statistics,
    tokenizer, reports, and a manifest with the hash of every file. A gate that fails ends with exit code 1
    and leaves no bundle. Results of stages are kept in a cache, and what did not change is not made again.

    Example: otau compile run/checkpoints/000040 --target cpu --out my_bundle
    """
    from otau.toolchain.cache.store import CompileCache, default_root
    from otau.toolchain.compilation import Compilation
    from otau.toolchain.compilation_report import compilation_report
    from otau.toolchain.targets import find_target

    for flag, given, valid in (
        ("--decoder", decoder, ("loop", "unrolled")),
        ("--allow", allow or "seed", ("seed",)),
    ):
        if given not in valid:
            raise UsageError(f"unknown name {given!r}", where=flag, fix=nearest_name(given, valid))
    found, precision = find_target(target, precision)
    if allow and precision == "fp32":
        raise UsageError(
            "fp32 is allowed no more than its own limits",
            where=f"--allow {allow}",
            expected="--precision bf16 or fp16 with it",
            got="fp32",
            fix="leave --allow out",
        )
    require("onnx_ir", extra="toolchain")
    pipeline = require("otau.toolchain.pipeline", extra="toolchain")
    compilation = Compilation(
        source=checkpoint,
        destination=out,
        target=found,
        precision=precision,
        cache=CompileCache(cache or default_root()),
        num_steps=num_steps,
        tokenizer=tokenizer,
        overrides={
            "norm_head": norm_head,
            "action_dims": action_dims,
            "state_dims": state_dims,
            "absent_cameras": tuple(absent_camera or ()),
            "without_response": without_response,
        },
        decoder=decoder,
        allow=allow,
        command=shlex.join(["otau", "compile", *sys.argv[2:]]),
    )
    try:
        with _progress(len(pipeline.STAGES) + 1) as on_stage:
            pipeline.compile_bundle(compilation, on_stage)
    finally:
        # A failed gate's numbers are worth as much as a passed one's.
        if json_output and compilation.gates:
            typer.echo(json.dumps(compilation_report(compilation), indent=2))
    if not json_output:
        _print(compilation_report(compilation))


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


def _print(report: dict[str, Any]) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if report["up_to_date"]:
        console.print(f"bundle: {report['bundle']}: up to date", markup=False)
        return
    gates = Table("gate", "error", "limit", "control failed", title=None)
    for gate in report["gates"]:
        gates.add_row(
            gate["name"],
            f"{gate['value']:.2e}",
            f"{gate['limit']:.1e}",
            "yes" if gate["control_failed"] else "no",
        )
    graphs = Table("graph", "nodes exported", "nodes", "parameters", "weights")
    for name, graph in report["graphs"].items():
        graphs.add_row(
            name,
            str(graph["nodes_exported"]),
            str(graph["nodes_final"]),
            f"{graph['parameters']:,}",
            f"{graph['bytes'] / 1e6:,.1f} MB",
        )
    stages = Table("stage", "time", "peak memory", "cached")
    for stage in report["stages"]:
        stages.add_row(
            stage["name"],
            f"{stage['seconds']:.1f} s",
            f"{stage['peak_rss_mb']:,.0f} MiB",
            "yes" if stage["cached"] else "",
        )
    for table in (stages, graphs, gates):
        console.print(table)
    console.print(
        f"{report['policy']} from {report['checkpoint']['format']} for {report['target']},"
        f" {report['precision']}, {report['num_steps']} steps: every gate passed",
        markup=False,
    )
    console.print(f"bundle: {report['bundle']}", markup=False)
