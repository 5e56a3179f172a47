"""Checkpoints as teams have them: one file a format, recognised by what is in the folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from otau.runtime.errors import UsageError
from otau.toolchain.intake.lerobot import is_lerobot, open_lerobot
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.toolchain.intake.openpi import is_openpi, open_openpi
from otau.toolchain.intake.safetensors import is_safetensors, open_safetensors
from otau.toolchain.intake.torch_bin import is_torch_bin, open_torch_bin
from otau.toolchain.intake.zero import is_zero, open_zero
from otau.training.policies.checkpoint import Checkpoint, check_checkpoint, check_values

__all__ = ["FORMATS", "OpenedCheckpoint", "load_checkpoint", "open_checkpoint"]

FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], OpenedCheckpoint]], ...] = (
    (is_lerobot, open_lerobot),
    (is_openpi, open_openpi),
    (is_safetensors, open_safetensors),
    (is_zero, open_zero),
    (is_torch_bin, open_torch_bin),
)
"""How a format is recognised and opened; the first that fits counts."""


def open_checkpoint(folder: Path) -> OpenedCheckpoint:
    """Open the weights of a checkpoint folder; none is read yet.

    Raises:
        UsageError: The folder is not there, or holds no weights that otau reads.
        CheckpointError: A file is damaged.
    """
    if not folder.is_dir():
        raise UsageError("there is no such checkpoint folder", where=folder, fix="check the path")
    for recognise, open_format in FORMATS:
        if recognise(folder):
            return open_format(folder)
    found = sorted(path.name for path in folder.iterdir())
    raise UsageError(
        "this checkpoint has no weights that otau reads",
        where=folder,
        expected="model.safetensors, pytorch_model.bin, shards with an index, or DeepSpeed's `latest`",
        got=", ".join(found[:10]) or "an empty folder",
        fix="name a complete checkpoint folder, for example run/checkpoints/000040",
    )


def load_checkpoint(folder: Path, *, values: bool = True) -> Checkpoint:
    """Open a checkpoint folder and check it strictly; its weights stay where they are.

    Args:
        folder: The checkpoint.
        values: Whether to read every weight once, and refuse one that is not finite.

    Raises:
        UsageError: The folder is not there, or has no configuration or no weights, or an unknown policy type.
        CheckpointError: The contents are not those of the policy.
    """
    opened = open_checkpoint(folder)
    checkpoint = check_checkpoint(opened.folder, opened.weights, opened.config, opened.head_dims)
    if values:
        check_values(checkpoint)
    return replace(checkpoint, format=opened.format)
