"""How far results are from their reference.

What is not finite, on either side, or of another shape, is infinitely wrong.
"""

from __future__ import annotations

import numpy as np

__all__ = ["action_rms", "relative_error", "relative_rms"]

_FROZEN = 2e-6
"""Largest relative error of a frozen action."""


def relative_error(got: np.ndarray, reference: np.ndarray) -> float:
    """Largest error relative to the reference's scale, which is max |reference| and at least 1."""
    if not _comparable(got, reference):
        return float("inf")
    scale = max(1.0, float(np.abs(reference).max(initial=0.0)))
    return float(np.abs(got.astype(np.float64) - reference).max(initial=0.0)) / scale


def relative_rms(got: np.ndarray, reference: np.ndarray) -> float:
    """Root of (sum of squared errors / sum of squared references); 0 for what is equal."""
    if not _comparable(got, reference):
        return float("inf")
    error = got.astype(np.float64) - reference
    squares, energy = float(np.vdot(error, error)), float(np.vdot(reference, reference.astype(np.float64)))
    if squares == 0.0:
        return 0.0
    return float(np.sqrt(squares / energy)) if energy else float("inf")


def action_rms(got: np.ndarray, reference: np.ndarray, delays: tuple[int, ...], action_dim: int) -> float:
    """Relative RMS error of the free actions, in the true dimensions, over all rows together.

    Frozen actions are copies of the action prefix: they would dilute the mean. In whatever precision the rest
    is computed, they must come back to float32's.

    Args:
        got: (rows, T, A).
        reference: (rows, T, A).
        delays: How many leading actions of each row are frozen.
        action_dim: True number of dimensions a, at most A.
    """
    if not _comparable(got, reference):
        return float("inf")
    frozen = np.arange(reference.shape[1]) < np.asarray(delays)[:, None]
    if relative_error(got[frozen], reference[frozen]) > _FROZEN:
        return float("inf")
    return relative_rms(got[~frozen][:, :action_dim], reference[~frozen][:, :action_dim])


def _comparable(got: np.ndarray, reference: np.ndarray) -> bool:
    return got.shape == reference.shape and bool(np.isfinite(got).all() and np.isfinite(reference).all())
