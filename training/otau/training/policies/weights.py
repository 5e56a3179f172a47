"""Weights in files, read one at a time.

A full-size policy has 13 GB of weights in float32. What works on one holds shapes, and reads a tensor when
it needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StoredTensor", "Weights"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads it into fresh memory. Never a view of a memory map: what is resident is what was asked for."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size as stored."""
        return self.numel * self.dtype.itemsize


Weights = Mapping[str, StoredTensor]
"""Weights by name."""
