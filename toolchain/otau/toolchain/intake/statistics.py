"""Other projects' normalisation statistics, under OpenTau's keys.

OpenTau adds an epsilon to every denominator and replaces those below it by 1. LeRobot and openpi do neither
in the same way, and differ between normalising and back. Their formulas fit into OpenTau's with an epsilon
of 0 and statistics that hold the denominator itself, so `norm_eps` is 0 for both and the epsilons are added
to the numbers here. A denominator of 0 becomes the smallest that float32 can tell from it: a constant
dimension still normalises to what it did, and no action is further from theirs than one unit in the last
place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.training.policies.checkpoint import statistics_keys
from otau.training.policies.config import PolicyConfig
from otau.training.policies.weights import StoredTensor

__all__ = ["NAMES", "above", "statistics_weights"]

NAMES = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILE": ("q01", "q99"), "IDENTITY": ()}
"""OpenTau's names of the two statistics of a mode."""


def above(first: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The number that lies `spread` above `first`, and above it in any case, as float32.

    Args:
        first: (n,) the lower bound.
        spread: (n,) at least 0.
    """
    first = first.astype(np.float32)
    second = (first.astype(np.float64) + spread).astype(np.float32)
    return np.maximum(second, np.nextafter(first, np.float32(np.inf)))


def statistics_weights(
    config: PolicyConfig, statistics: Mapping[str, np.ndarray], where: Path
) -> dict[str, StoredTensor]:
    """The keys that OpenTau's layout has for statistics.

    Args:
        config: With the modes of state and action.
        statistics: `state.<name>` and `action.<name>`, (n,) each, in OpenTau's names.
        where: Named in errors.

    Returns:
        Tensors (1, n) float32.

    Raises:
        CheckpointError: A value is not finite.
    """
    weights = {}
    for key, (name, _) in statistics_keys(config).items():
        with np.errstate(over="ignore"):  # found right below
            values = np.asarray(statistics[name], np.float32)[None]
        if not np.isfinite(values).all():
            raise CheckpointError(
                "the normalisation statistics are not finite: the checkpoint was saved without them",
                where=f"{where}: {name}",
                got=f"{values[~np.isfinite(values)][:5].tolist()} among {values.size:,} numbers",
                fix="save the checkpoint together with its data set's statistics",
            )
        weights[key] = StoredTensor(values.shape, torch.float32, partial(_copy, values))
    return weights


def _copy(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.copy())
