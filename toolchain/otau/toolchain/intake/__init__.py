"""Checkpoints as teams have them: one file a format, recognised by what is in the folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from otau.runtime.errors import UsageError
from otau.toolchain.intake.lerobot import is_lerobot, open_lerobot
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.toolchain.intake.openpi import is_openpi, open_openpi
from otau.toolchain.intake.safetensors import INDEX_FILE, WEIGHTS_FILE, is_safetensors, open_safetensors
from otau.toolchain.intake.torch_bin import TORCH_FILES, TORCH_INDEX_FILE, is_torch_bin, open_torch_bin
from otau.toolchain.intake.zero import is_zero, open_zero
from otau.toolchain.intake.zero_shards import LATEST, OPTIMIZER_FILE
from otau.training.policies.checkpoint import Checkpoint, check_checkpoint, check_values

__all__ = ["FORMATS", "OpenedCheckpoint", "load_checkpoint", "open_checkpoint"]

_LOG = logging.getLogger(__name__)

FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], OpenedCheckpoint]], ...] = (
    (is_lerobot, open_lerobot),
    (is_openpi, open_openpi),
    (is_safetensors, open_safetensors),
    (is_zero, open_zero),
    (is_torch_bin, open_torch_bin),
)
"""How a format is recognised and opened; the first that fits counts."""


def open_checkpoint(folder: Path) -> OpenedCheckpoint:
    """Open the weights of a checkpoint folder; none is read yet. Warns where it holds other ones, too.

    Raises:
        UsageError: The folder is not there, or holds no weights that otau reads.
        CheckpointError: A file is damaged.
    """
    if not folder.is_dir():
        raise UsageError("there is no such checkpoint folder", where=folder, fix="check the path")
    for recognise, open_format in FORMATS:
        if recognise(folder):
            opened = open_format(folder)
            _warn_of_others(opened)
            return opened
    found = sorted(path.name for path in folder.iterdir())
    raise UsageError(
        "this checkpoint has no weights that otau reads",
        where=folder,
        expected="model.safetensors, pytorch_model.bin, shards with an index, or DeepSpeed's `latest`",
        got=", ".join(found[:10]) or "an empty folder",
        fix="name a complete checkpoint folder, for example run/checkpoints/000040",
    )


def _warn_of_others(opened: OpenedCheckpoint) -> None:
    """Name what is left aside of a folder that holds weights in several ways: it may be another state."""
    folders = {opened.folder, *(path.parent for path in opened.files)}
    found = {path for folder in folders for path in folder.iterdir() if _is_weights(path.name)}
    aside = sorted(str(path) for path in found - set(opened.files))
    if aside:
        read = sorted(path.name for path in opened.files if _is_weights(path.name))
        _LOG.warning(
            "the weights are read as %s, from %s; left aside: %s",
            opened.format,
            ", ".join(read[:3]),
            ", ".join(aside[:10]),
        )


def _is_weights(name: str) -> bool:
    known = (WEIGHTS_FILE, INDEX_FILE, *TORCH_FILES, TORCH_INDEX_FILE, LATEST)
    return name in known or OPTIMIZER_FILE.fullmatch(name) is not None


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
