"""`otau compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compile_checkpoint"]


def compile_checkpoint() -> None: ...
