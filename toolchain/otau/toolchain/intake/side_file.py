"""`otau.json`: what a checkpoint of another project does not say about itself, said beside it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from otau.runtime.errors import CheckpointError, nearest_name
from otau.training.policies.files import read_text

__all__ = ["SIDE_FILE", "read_json", "read_side_file"]

SIDE_FILE = "otau.json"

_Record = TypeVar("_Record", bound=msgspec.Struct)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file of a checkpoint folder.

    Raises:
        CheckpointError: The file is not one, unreasonably large, or outside of the folder.
    """
    try:
        document = json.loads(read_text(folder, name))
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "a file of the checkpoint is not a JSON object",
            where=folder / name,
            expected="{...}",
            got=error,
            fix="copy it again",
        ) from None
    return document


def read_side_file(folder: Path, kind: type[_Record]) -> _Record | None:
    """`otau.json` of a checkpoint folder, or None where there is none.

    Args:
        folder: The checkpoint.
        kind: A record that forbids unknown fields.

    Raises:
        CheckpointError: The file is not valid; an unknown key is named with the nearest valid one.
    """
    path = folder / SIDE_FILE
    if not os.path.lexists(path):  # What is no plain file is refused, not overlooked.
        return None
    try:
        return msgspec.convert(read_json(folder, SIDE_FILE), kind)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `([^`]*)`", str(error))
        fix = nearest_name(unknown.group(1), kind.__struct_fields__) if unknown else "correct this key"
        raise CheckpointError(
            "what is said about the checkpoint is not valid", where=path, got=error, fix=fix
        ) from None
