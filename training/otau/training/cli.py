"""The verbs of the training side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from otau.runtime.dependencies import require

__all__ = ["init"]


def init(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make.")],
    policy: Annotated[str, typer.Option(metavar="NAME", help="pi05 or pi0.")] = "pi05",
    size: Annotated[str, typer.Option(metavar="NAME", help="tiny, small or full (3.4 billion).")] = "tiny",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the weights.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a randomly initialised checkpoint in OpenTau's layout.

    For demos, tests and benchmarks: the policy moves the arm, and knows nothing. The sizes tiny and small
    come with a tokenizer; a full one takes 6.7 GB.

    Example: otau init --policy pi05 --size tiny --out my_checkpoint
    """
    random_checkpoint = require("otau.training.random_checkpoint", extra="training")
    written = random_checkpoint.write_random_checkpoint(out, policy, size, seed)
    if json_output:
        typer.echo(json.dumps(written, indent=2))
        return
    tokenizer = "with a tokenizer" if written["tokenizer"] else "without a tokenizer"
    typer.echo(
        f"{out}: {policy}, {size}, {written['parameters']:,} parameters"
        f" in {written['dtype']} ({written['bytes'] / 1e6:,.1f} MB), {tokenizer}"
    )
