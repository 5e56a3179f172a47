"""From an observation to a KV cache.

`PrefixSource` is the seam of the placements: `onboard` has `LocalPrefix`, which runs the prefix graph
here; `split` will have one that asks a server for the cache. (`remote` gets whole chunks instead, so
its seam is `Policy.infer`.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from otau.runtime.bundle import Bundle
from otau.runtime.engines import Engine, ResidentTensor
from otau.runtime.errors import UsageError, nearest_name
from otau.runtime.images import pixels_from_image
from otau.runtime.messages import excerpt
from otau.runtime.observation import ObservationBatch
from otau.runtime.prompt import PromptEncoder, state_bins, state_text
from otau.runtime.tokens import check_range, checked_ids, checked_tokens
from otau.runtime.vectors import StateSpace

__all__ = ["KVCache", "LocalPrefix", "PrefixSource"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KVCache:
    """What the VLM made of a batch of observations, and what the decoder must know of them."""

    tensors: Mapping[str, ResidentTensor]
    """`keys`, `values`, `prefix_mask`, where the prefix engine left them."""
    state: np.ndarray
    """(B, s) float32, the raw state at the chunk's start."""
    state_tensor: np.ndarray
    """(B, S) float32, normalised and zero-padded."""
    dataset_index: np.ndarray
    """(B,) int64, row of the normalisation statistics."""
    timings: Mapping[str, float]
    """[ms] by stage."""

    @property
    def keys(self) -> np.ndarray:
        """(layers, B, P, Hkv, D) float32, after RoPE."""
        return self.tensors["keys"].numpy()

    @property
    def values(self) -> np.ndarray:
        """(layers, B, P, Hkv, D) float32."""
        return self.tensors["values"].numpy()

    @property
    def mask(self) -> np.ndarray:
        """(B, P) bool, True where a position is valid."""
        return self.tensors["prefix_mask"].numpy()


class PrefixSource(Protocol):
    """Where KV caches come from."""

    def prefix(self, batch: ObservationBatch) -> KVCache:
        """The KV cache of a batch of observations."""
        ...

    def close(self) -> None:
        """Frees what the source holds."""
        ...


class LocalPrefix:
    """Prepares observations and runs the prefix graph on this machine."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        """Takes the engine over and closes it with itself."""
        self._manifest = bundle.manifest
        self._engine = engine
        self._states = StateSpace(bundle.manifest, bundle.stats()["state"])
        tokenizer = bundle.tokenizer()
        self._encoder = PromptEncoder(self._manifest.prompt, tokenizer) if tokenizer is not None else None

    def prefix(self, batch: ObservationBatch) -> KVCache:
        """The KV cache of a batch of observations.

        Raises:
            UsageError: The observations are not what the bundle takes.
            EngineError: The prefix graph failed.
        """
        start = time.perf_counter()
        state = self._states.checked(batch.state)
        head = self._heads(batch, len(state))
        normalised = self._states.normalise(state, head)
        inputs = self._images(batch, len(state))
        inputs["tokens"], inputs["token_masks"] = self._tokens(batch, normalised)
        state_tensor = self._states.tensor(normalised)
        if self._manifest.state_route == "prefix":
            inputs["state"] = state_tensor
            inputs["state_open"], inputs["state_close"] = self._state_texts(batch)
        elif batch.state_open_ids is not None or batch.state_close_ids is not None:
            raise UsageError(
                "token ids around the state are given, but this policy has no state token in its prefix",
                expected=f"no state_open_ids and state_close_ids: state_route {self._manifest.state_route}",
                fix="leave them out",
            )
        prepared = time.perf_counter()
        tensors = self._engine.run_resident(inputs)
        timings = {
            "prepare": (prepared - start) * 1e3,
            "prefix": (time.perf_counter() - prepared) * 1e3,
        }
        return KVCache(tensors, state, state_tensor, head, timings)

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()

    def _heads(self, batch: ObservationBatch, size: int) -> np.ndarray:
        """The row of the statistics for each element, within range."""
        count = len(self._manifest.norm.heads)
        if batch.dataset_index is None and count > 1:
            # Row 0 would be another robot's scale for all but one of them.
            raise UsageError(
                "the bundle has several normalisation heads, and none is chosen",
                expected=f"one of {', '.join(self._manifest.norm.heads)}",
                got="no dataset_index",
                fix="give --norm-head NAME, or compile again with --norm-head NAME",
            )
        head = np.zeros(size, np.int64) if batch.dataset_index is None else np.asarray(batch.dataset_index)
        if head.shape != (size,) or head.dtype.kind not in "iu" or head.min() < 0 or head.max() >= count:
            raise UsageError(
                "dataset_index does not pick rows of the normalisation statistics",
                expected=f"{size} integers in 0..{count - 1} ({', '.join(self._manifest.norm.heads)})",
                got=excerpt(head),
                fix="give numbers of these rows; a bundle compiled with --norm-head has one only",
            )
        return head.astype(np.int64)

    def _images(self, batch: ObservationBatch, size: int) -> dict[str, np.ndarray]:
        """Pictures in the manifest's order, then masked placeholders for some that are not there."""
        cameras = self._manifest.cameras
        names = [camera.name for camera in cameras]
        for name in batch.images:
            if name not in names:
                raise UsageError("the bundle has no such camera", got=name, fix=nearest_name(name, names))
        missing = [name for name in names if name not in batch.images]
        if len(missing) == len(names):
            raise UsageError(
                "the observation has no picture",
                expected=f"cameras {', '.join(names)}",
                fix="give at least one picture; a camera that is absent may be a black one",
            )
        placeholders, fit = min(len(missing), self._manifest.empty_cameras), self._manifest.pictures
        if missing:
            _log.warning(
                "no picture of %s: the prefix goes without, with %d masked placeholder(s)",
                ", ".join(missing),
                placeholders,
            )
        pixels = [
            pixels_from_image(
                batch.images[camera.name],
                camera.height,
                camera.width,
                name=camera.name,
                padding=fit.padding,
                resize=fit.resize,
                fill=fit.fill,
            )
            for camera in cameras
            if camera.name in batch.images
        ]
        for name, image in zip((name for name in names if name in batch.images), pixels, strict=True):
            if len(image) != size:
                raise UsageError(
                    f"{name} has another batch size than the state",
                    expected=size,
                    got=len(image),
                    fix="give as many pictures as states",
                )
        blank = np.full((size, 3, cameras[0].height, cameras[0].width), -1, np.float32)
        masks = np.ones((size, len(pixels) + placeholders), bool)
        masks[:, len(pixels) :] = False
        return {"images": np.stack(pixels + [blank] * placeholders, axis=1), "image_masks": masks}

    def _tokens(self, batch: ObservationBatch, normalised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and masks (B, L): as given, or of the prompts."""
        vocab = self._manifest.vocab
        if batch.tokens is not None:
            if batch.prompts is not None:
                raise UsageError(
                    "a prompt and token ids are given, but one would be ignored",
                    got=f"prompt {batch.prompts[0]!r} and token ids" if batch.prompts else "both",
                    fix="give either the text or lang_tokens with lang_masks",
                )
            tokens, masks = checked_tokens(batch.tokens, batch.token_masks, len(normalised))
            return check_range(tokens, vocab, "the given token ids", masks), masks
        if batch.prompts is None:
            raise UsageError(
                "the observation has no prompt",
                expected="a prompt, or token ids with their masks",
                fix="say what the robot is to do",
            )
        encoder = self._require_encoder("the prompt")
        if len(batch.prompts) != len(normalised):
            raise UsageError(
                "there is another number of prompts than of states",
                expected=len(normalised),
                got=len(batch.prompts),
                fix="give one prompt for each state",
            )
        spec = self._manifest.prompt
        states = [""] * len(normalised)
        if spec.state_dims is not None:
            listed = self._states.tensor(normalised)[:, : spec.state_dims]
            states = [state_text(bins) for bins in state_bins(listed, spec.state_bins)]
        tokens, masks = encoder.encode(batch.prompts, states)
        return check_range(tokens, vocab, "the token ids that the bundle's tokenizer made", masks), masks

    def _state_texts(self, batch: ObservationBatch) -> tuple[np.ndarray, np.ndarray]:
        """Token ids around the state token: as given, or of the manifest's texts."""
        vocab, spec = self._manifest.vocab, self._manifest.prompt
        given = (batch.state_open_ids, batch.state_close_ids)
        if given[0] is None and given[1] is None:
            encoder = self._require_encoder("the texts around the state")
            given = (encoder.ids(spec.state_open or ""), encoder.ids(spec.state_close or ""))
        if given[0] is None or given[1] is None:
            raise UsageError(
                "token ids are given for one side of the state only",
                expected="state_open_ids and state_close_ids, or neither",
            )
        return checked_ids(given[0], vocab, "state_open_ids"), checked_ids(given[1], vocab, "state_close_ids")

    def _require_encoder(self, what: str) -> PromptEncoder:
        if self._encoder is None:
            raise UsageError(
                f"the bundle has no tokenizer, so it cannot read {what}",
                fix="give token ids, or compile again with --tokenizer DIR",
            )
        return self._encoder
