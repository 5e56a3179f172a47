"""A checkpoint whose weights can be read, whatever it is stored as."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from otau.training.policies.config import PolicyConfig
from otau.training.policies.sizes import HeadDims
from otau.training.policies.weights import Weights

__all__ = ["OpenedCheckpoint"]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What a format makes of a checkpoint folder."""

    folder: Path
    format: str
    """For people, for example `DeepSpeed ZeRO-2, 2 ranks`."""
    weights: Weights
    """By OpenTau's key."""
    files: tuple[Path, ...]
    """Every file that the weights come from."""
    config: PolicyConfig | None = None
    """None: OpenTau's, in the folder."""
    head_dims: HeadDims | None = None
    """None: those of the folder's `model_dims.json`, if it has one."""
