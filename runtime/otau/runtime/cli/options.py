"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = ["RequireSignature"]

RequireSignature: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--require-signature",
        metavar="KEY.pub",
        help="Refuse the bundle unless this key signed it; given several times, one of them.",
        show_default="none but those in $OTAU_REQUIRE_SIGNATURE",
    ),
]
"""Public keys for `Bundle.open(..., require_signature=...)`."""
