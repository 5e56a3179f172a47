"""Normalisation of states and actions, in the order of operations that training used.

The order matters: a degenerate dimension is 0/1e-6 away from a bin edge, so another order of the same
formula puts it into another bin of the prompt. bfloat16 is emulated: float32 operands, each result
rounded to the nearest bfloat16, ties to even, which is what a processor without fused operations does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from otau.runtime.errors import BundleError, UsageError, nearest_name
from otau.runtime.messages import excerpt
from otau.runtime.spec import NormMode

__all__ = ["Normaliser", "find_head", "round_to_bfloat16"]

_STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILE": ("q01", "q99")}


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even; the result is float32 again.

    NaN stays NaN; what is beyond the largest bfloat16 becomes infinite.
    """
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):  # only NaN patterns wrap, and those are put back below
        rounded = ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(values), values, rounded)


def find_head(name: str, heads: Sequence[str], where: object) -> int:
    """The row of the statistics that a name or a number means.

    Args:
        name: One of `heads`, or a row's number.
        heads: The rows' names, "{robot_type}::{control_mode}" as OpenTau has them.
        where: Named in the error: the flag or argument that gave the name.

    Raises:
        UsageError: There is no such row.
    """
    if name in heads:
        return list(heads).index(name)
    if name.isdecimal() and int(name) < len(heads):
        return int(name)
    raise UsageError(
        "the statistics have no such normalisation head",
        where=where,
        expected=f"a name, or a number below {len(heads)}",
        got=name,
        fix=nearest_name(name, heads),
    )


class Normaliser:
    """Normalises one vector, the state or the action, by the statistics of one of several heads."""

    def __init__(
        self,
        mode: NormMode,
        statistics: Mapping[str, np.ndarray],
        *,
        eps: float,
        centre_degenerate: bool,
        dtype: Literal["float32", "bfloat16"] = "float32",
        name: str = "vector",
    ) -> None:
        """Prepares offset and scale of every head.

        Args:
            mode: How values are normalised.
            statistics: (heads, width) float32 each: mean and std, min and max, or q01 and q99.
            eps: Added to the denominator, and the bound below which a dimension is degenerate.
            centre_degenerate: Whether a degenerate dimension maps to 0 (else to -1); not for MEAN_STD.
            dtype: Precision of the statistics and of `normalise`.
            name: Named in errors.

        Raises:
            BundleError: Statistics are missing, misshapen or not finite, or leave a dimension no scale.
        """
        self.mode = mode
        self.name = name
        self._dtype = dtype
        self.width: int | None = None
        """Width of the statistics; None for IDENTITY, which takes any."""
        if mode == "IDENTITY":
            return
        first, second = (self._round(array) for array in _checked_statistics(mode, statistics, name))
        self.width = first.shape[1]
        self._heads = first.shape[0]
        small = self._round(np.asarray(eps, np.float32))
        spread = second if mode == "MEAN_STD" else self._round(second - first)
        scale = np.where(np.abs(spread) < small, np.float32(1), spread)
        shift = self._round(np.float32(0.5) * self._round(scale - spread))
        self._offset = first
        self._shift = shift if centre_degenerate and mode != "MEAN_STD" else np.zeros_like(shift)
        # The sum takes eps itself, not its bfloat16: a scalar is not rounded before it is added.
        self._scale = self._round(scale + np.float32(eps))
        if not self._scale.all():
            raise BundleError(
                f"the {mode} statistics of the {name} leave a dimension no scale to divide by",
                expected="a spread, or an epsilon above 0",
                got=f"eps {eps:g} and a spread of {-eps:g}: (head, dimension) {_zeros(self._scale)}",
                fix="compile the checkpoint again, with its statistics computed anew",
            )

    def normalise(self, values: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Raw to normalised values, computed in this normaliser's dtype.

        Args:
            values: (B, ..., width) float32.
            head: (B,) int, the row of the statistics for each element of the batch.

        Returns:
            Like `values`, float32.
        """
        values = self._checked(values)
        if self.mode == "IDENTITY":
            return values
        offset, scale, shift = self._rows(head, values.ndim)
        if self.mode == "MEAN_STD":
            return self._round(self._round(self._round(values) - offset) / scale)
        centred = self._round(self._round(self._round(values) - offset) + shift)
        ratio = self._round(self._round(np.float32(2) * centred) / scale)
        return self._round(ratio - np.float32(1))

    def unnormalise(self, values: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Normalised to raw values, computed in float32 on statistics of this normaliser's dtype.

        Args:
            values: (B, ..., width) float32.
            head: (B,) int, the row of the statistics for each element of the batch.

        Returns:
            Like `values`, float32.
        """
        values = self._checked(values)
        if self.mode == "IDENTITY":
            return values
        offset, scale, shift = self._rows(head, values.ndim)
        raw: np.ndarray
        if self.mode == "MEAN_STD":
            raw = values * scale + offset
        else:
            raw = (values + np.float32(1)) / np.float32(2) * scale + offset - shift
        return raw

    def _round(self, values: np.ndarray) -> np.ndarray:
        return round_to_bfloat16(values) if self._dtype == "bfloat16" else values

    def _checked(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if self.width is not None and values.shape[-1] != self.width:
            raise UsageError(
                f"the {self.name} has the wrong width", expected=self.width, got=values.shape[-1]
            )
        return values

    def _rows(self, head: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offset, scale and shift of each element's head, broadcast to values of that rank."""
        head = np.asarray(head)
        if head.min() < 0 or head.max() >= self._heads:
            raise UsageError(
                f"no such row in the statistics of the {self.name}",
                where="dataset_index",
                expected=f"0..{self._heads - 1}",
                got=excerpt(head),
            )
        shape = (len(head), *([1] * (rank - 2)), -1)
        offset, scale, shift = (
            rows[head].reshape(shape) for rows in (self._offset, self._scale, self._shift)
        )
        return offset, scale, shift


def _zeros(values: np.ndarray) -> str:
    """Where a matrix is zero, in words."""
    return ", ".join(f"({row}, {column})" for row, column in np.argwhere(values == 0)[:5].tolist())


def _checked_statistics(
    mode: NormMode, statistics: Mapping[str, np.ndarray], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The two statistics of a mode, (heads, width) float32, finite."""
    keys = _STATISTICS[mode]
    missing = [key for key in keys if key not in statistics]
    if missing:
        raise BundleError(
            f"{mode} statistics of the {name} are missing",
            expected=", ".join(keys),
            got=", ".join(sorted(statistics)) or "none",
        )
    first, second = (np.asarray(statistics[key], np.float32) for key in keys)
    if first.ndim != 2 or first.shape != second.shape or 0 in first.shape:
        raise BundleError(
            f"{mode} statistics of the {name} are misshapen",
            expected="two of (heads, width)",
            got=f"{first.shape} and {second.shape}",
        )
    for key, value in zip(keys, (first, second), strict=True):
        if not np.isfinite(value).all():
            raise BundleError(f"the statistic {key} of the {name} is not finite", got=excerpt(value))
    return first, second
