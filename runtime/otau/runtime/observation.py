"""What a robot sees and is told, for one control step or for a batch of recorded ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from otau.runtime.spec import Manifest

__all__ = ["Observation", "ObservationBatch", "dummy_batch"]


@dataclass(frozen=True, eq=False)
class ObservationBatch:
    """Observations of B moments, as the policy's stages take them."""

    images: Mapping[str, np.ndarray]
    """By camera name: uint8 (B, h, w, 3), or float (B, 3, h, w) in [0, 1]."""
    state: np.ndarray
    """(B, s) float32, raw, in the manifest's units."""
    prompts: tuple[str, ...] | None = None
    """One task an element; None where token ids are given."""
    tokens: np.ndarray | None = None
    """(B, L) int64 token ids of the whole prompt."""
    token_masks: np.ndarray | None = None
    """(B, L) bool, True for a real token."""
    dataset_index: np.ndarray | None = None
    """(B,) int64, row of the normalisation statistics; may be None where the bundle has one row only."""
    state_open_ids: np.ndarray | None = None
    """(n,) int64 token ids before the state token, where the policy has one and the bundle no tokenizer."""
    state_close_ids: np.ndarray | None = None
    """(n,) int64 token ids after it."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What a robot sees and is told at one moment."""

    images: Mapping[str, np.ndarray]
    """By camera name: uint8 (h, w, 3), or float (3, h, w) or (1, 3, h, w) in [0, 1]."""
    state: np.ndarray
    """(s,) raw, in the manifest's units."""
    prompt: str = ""
    """The task; empty where token ids are given."""
    tokens: np.ndarray | None = None
    """(L,) int64 token ids of the whole prompt, for a bundle without a tokenizer."""
    token_masks: np.ndarray | None = None
    """(L,) bool, True for a real token."""
    dataset_index: int | None = None
    """Row of the normalisation statistics; may be None where there is one row, or `Policy.open` chose it."""
    state_open_ids: np.ndarray | None = None
    """(n,) int64 token ids before the state token, where the policy has one and the bundle no tokenizer."""
    state_close_ids: np.ndarray | None = None
    """(n,) int64 token ids after it."""

    def batch(self) -> ObservationBatch:
        """This observation as a batch of one."""
        images = {name: np.asarray(image) for name, image in self.images.items()}
        return ObservationBatch(
            images={name: image[None] if image.ndim == 3 else image for name, image in images.items()},
            state=np.asarray(self.state)[None],
            prompts=(self.prompt,) if self.prompt else None,
            tokens=None if self.tokens is None else np.asarray(self.tokens)[None],
            token_masks=None if self.token_masks is None else np.asarray(self.token_masks)[None],
            dataset_index=None if self.dataset_index is None else np.array([self.dataset_index], np.int64),
            state_open_ids=None if self.state_open_ids is None else np.asarray(self.state_open_ids),
            state_close_ids=None if self.state_close_ids is None else np.asarray(self.state_close_ids),
        )


def dummy_batch(manifest: Manifest, rng: np.random.Generator) -> ObservationBatch:
    """One made-up observation that fits a bundle: noise for pictures, a state near zero, head 0.

    Args:
        manifest: What the bundle takes.
        rng: Where the noise comes from.
    """
    images = {
        camera.name: rng.integers(0, 256, (1, camera.height, camera.width, 3), np.uint8)
        for camera in manifest.cameras
    }
    state = rng.standard_normal((1, manifest.state.dim), np.float32) * np.float32(0.1)
    head = np.zeros(1, np.int64)
    if manifest.prompt.tokenizer is not None:
        return ObservationBatch(images, state, prompts=("do nothing in particular",), dataset_index=head)
    length = manifest.prompt.max_length
    ids = np.arange(2, dtype=np.int64) % manifest.vocab if manifest.state_route == "prefix" else None
    return ObservationBatch(
        images,
        state,
        tokens=np.arange(length, dtype=np.int64)[None] % manifest.vocab,
        token_masks=np.ones((1, length), bool),
        dataset_index=head,
        state_open_ids=ids,
        state_close_ids=ids,
    )
