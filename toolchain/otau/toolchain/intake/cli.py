"""The verb `convert`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from otau.runtime.dependencies import require
from otau.runtime.errors import UsageError

__all__ = ["convert"]


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint, of any format otau reads.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make.")],
    to: Annotated[str, typer.Option(metavar="NAME", help="safetensors.")] = "safetensors",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of floating-point tensors: keep, fp32 or bf16.")
    ] = "keep",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="More than this goes into several files with an index.")
    ] = "5GB",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a checkpoint of any format as a folder in safetensors.

    Reads DeepSpeed ZeRO shards (trained parameters as their float32 masters), PyTorch's .bin and .pt, and
    safetensors, one tensor at a time. Nothing in a file is ever run. Configuration and tokenizer are copied.

    Example: otau convert run/checkpoints/000040 --to safetensors --out my_checkpoint
    """
    if to != "safetensors":
        raise UsageError("otau converts to no such format", where="--to", expected="safetensors", got=to)
    module = require("otau.toolchain.intake.convert", extra="toolchain")
    with _progress() as on_tensor:
        written = module.convert_checkpoint(checkpoint, out, dtype, max_shard_size, on_tensor)
    if json_output:
        typer.echo(json.dumps(written, indent=2))
        return
    typer.echo(
        f"{out}: {written['tensors']} tensors ({written['bytes'] / 1e6:,.1f} MB) from {written['format']},"
        f" {written['seconds']:.1f} s, peak {written['peak_rss_mb']:,.0f} MiB"
    )
    for name, stored in written["shared"].items():
        typer.echo(f"{name} is stored as {stored}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar over the bytes, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("convert", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
