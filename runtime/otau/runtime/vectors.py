"""State and action vectors, between the robot's numbers and the graphs' tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from otau.runtime.errors import BundleError, UsageError
from otau.runtime.messages import excerpt
from otau.runtime.normalise import Normaliser
from otau.runtime.spec import Manifest, VectorSpec

__all__ = ["ActionSpace", "StateSpace"]


class StateSpace:
    """Turns raw states into normalised ones."""

    def __init__(self, manifest: Manifest, statistics: Mapping[str, np.ndarray]) -> None:
        """Prepares the normaliser.

        Args:
            manifest: Widths, mode and precision.
            statistics: The state's, (heads, width) float32 each.
        """
        norm = manifest.norm
        self.spec = manifest.state
        self._normaliser = Normaliser(
            norm.state,
            statistics,
            eps=norm.eps,
            centre_degenerate=norm.centre_degenerate,
            dtype=norm.state_dtype if manifest.state_route == "prompt" else "float32",
            name="state",
        )
        _check_width(self.spec, self._normaliser)

    def checked(self, state: np.ndarray) -> np.ndarray:
        """The raw state (B, s) as float32.

        Raises:
            UsageError: Another shape, or a value that is not finite.
        """
        return _checked_vector(state, (None, self.spec.dim), "state")

    def normalise(self, state: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Normalises (B, s) to (B, width of the statistics); dimensions that the robot lacks are raw 0.

        Raises:
            UsageError: A value is so large that it is not finite any more.
        """
        width = self._normaliser.width or self.spec.dim
        return _normalised(self._normaliser, _zero_padded(state, width), head)

    def tensor(self, normalised: np.ndarray) -> np.ndarray:
        """The graphs' tensor (B, S) of a normalised state."""
        return _zero_padded(normalised, self.spec.max_dim)


class ActionSpace:
    """Turns committed raw actions into the decoder's prefix, and its chunks into raw actions."""

    def __init__(self, manifest: Manifest, statistics: Mapping[str, np.ndarray]) -> None:
        """Prepares the normaliser.

        Args:
            manifest: Widths, mode and which actions are relative to the state.
            statistics: The action's, (heads, width) float32 each.
        """
        norm = manifest.norm
        self.spec = manifest.action
        self._chunk = manifest.flow.chunk
        self._relative = [int(index) for index in manifest.delta_actions]
        self._to_state = list(manifest.delta_actions.values())
        self._normaliser = Normaliser(
            norm.action,
            statistics,
            eps=norm.eps,
            centre_degenerate=norm.centre_degenerate,
            name="action",
        )
        _check_width(self.spec, self._normaliser)

    def prefix(self, actions: np.ndarray, state: np.ndarray, head: np.ndarray) -> np.ndarray:
        """The decoder's `action_prefix` of raw, absolute actions that are committed already.

        Args:
            actions: (B, k, a) raw, k at most the chunk.
            state: (B, s) raw, at the chunk's start.
            head: (B,) int, row of the statistics.

        Returns:
            (B, T, A) float32, made relative, normalised, and zero-padded in both directions.

        Raises:
            UsageError: Another shape, or a value that is not finite.
        """
        actions = _checked_vector(actions, (len(state), None, self.spec.dim), "action_prefix")
        if actions.shape[1] > self._chunk:
            raise UsageError(
                "the action prefix is longer than the chunk",
                expected=f"at most {self._chunk} actions",
                got=actions.shape[1],
                fix="give only the first of them",
            )
        actions = actions.copy()
        with np.errstate(over="ignore"):  # found below
            actions[..., self._relative] -= state[:, None, self._to_state]
        width = self._normaliser.width or self.spec.dim
        normalised = _normalised(self._normaliser, _zero_padded(actions, width), head)
        rows = np.zeros((len(state), self._chunk, self.spec.max_dim), np.float32)
        rows[:, : actions.shape[1], :width] = normalised
        return rows

    def raw(self, normalised: np.ndarray, state: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Raw, absolute actions (B, T, a) of a normalised chunk (B, T, A).

        Args:
            normalised: (B, T, A) float32, as the decoder gives it.
            state: (B, s) raw, at the chunk's start.
            head: (B,) int, row of the statistics.
        """
        width = self._normaliser.width or self.spec.dim
        actions = self._normaliser.unnormalise(normalised[..., :width], head)[..., : self.spec.dim].copy()
        actions[..., self._relative] += state[:, None, self._to_state]
        return actions


def _check_width(spec: VectorSpec, normaliser: Normaliser) -> None:
    """The statistics may be as wide as the robot's vector, as the graph's tensor, or between."""
    if normaliser.width is not None and not spec.dim <= normaliser.width <= spec.max_dim:
        raise BundleError(
            f"the statistics of the {normaliser.name} have the wrong width",
            expected=f"{spec.dim}..{spec.max_dim}",
            got=normaliser.width,
            fix="compile the checkpoint again",
        )


def _checked_vector(values: np.ndarray, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    """Float32 values of that shape (None: any size), all finite."""
    values = np.asarray(values)
    fits = values.ndim == len(shape) and all(
        want in (None, size) for size, want in zip(values.shape, shape, strict=True)
    )
    if not fits or values.dtype.kind not in "fiu":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UsageError(
            f"the {name} has the wrong shape or dtype",
            expected=f"numbers of shape ({wanted})",
            got=f"{values.dtype} of shape {values.shape}",
            fix="give the raw numbers of the robot's own dimensions, without padding",
        )
    with np.errstate(over="ignore"):  # found right below
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise UsageError(
            f"the {name} has values that are not finite",
            got=excerpt(values),
            fix="check the sensor or the file they come from",
        )
    return values


def _normalised(normaliser: Normaliser, values: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Normalised values, all finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        normalised = normaliser.normalise(values, head)
    if not np.isfinite(normalised).all():
        raise UsageError(
            f"the {normaliser.name} has values that are not finite once normalised",
            expected="values of the size that the policy was trained with",
            got=excerpt(values),
            fix="check the units, and the dimensions' order",
        )
    return normalised


def _zero_padded(values: np.ndarray, width: int) -> np.ndarray:
    """The last dimension filled up with zeros."""
    padded = np.zeros((*values.shape[:-1], width), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded
