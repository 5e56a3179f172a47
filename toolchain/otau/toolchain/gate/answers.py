"""What a policy answers to its probes: the reference that graphs and engines are judged against.

It comes in two halves, so that a full-size policy never has both programs in memory: the prefix's, which
takes the VLM's weights, and the decoder's, which takes the expert's and works on the caches of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from otau.toolchain.gate.metrics import relative_rms
from otau.toolchain.gate.probes import Probe, ProbeFacts

__all__ = ["CONTROLS", "CacheFloor", "NoiseFloor", "PrefixAnswer", "PrefixReference", "Reference"]

CONTROLS = ("fine", "floor", "seed")
"""The negative controls of the decoder: a weight scaled by 1.01, and by what exceeds the noise floor, or the
allowance of `--allow seed`, by a factor of 4."""


@dataclass(frozen=True, eq=False)
class PrefixAnswer:
    """A KV cache."""

    keys: np.ndarray
    """(layers, B, P, Hkv, D) float32, after RoPE."""
    values: np.ndarray
    """(layers, B, P, Hkv, D) float32."""
    mask: np.ndarray
    """(B, P) bool; what is False is compared nowhere."""


class CacheFloor(msgspec.Struct, frozen=True, kw_only=True):
    """How far K and V in bfloat16, as served, are from themselves in float32: relative RMS errors."""

    keys: tuple[float, ...]
    """One a layer."""
    values: tuple[float, ...]
    """One a layer."""


class NoiseFloor(CacheFloor, frozen=True, kw_only=True):
    """The same of the actions."""

    actions: float
    """Of the whole chain, prefix and decoder in bfloat16."""
    seed_spread: float
    """Relative RMS distance of the actions of two noise seeds, at delay 0, in float32."""


@dataclass(frozen=True, eq=False)
class PrefixReference:
    """The first half: one cache a probe."""

    facts: ProbeFacts
    probes: tuple[Probe, ...]
    caches: Mapping[str, PrefixAnswer]
    """By probe."""
    served: Mapping[str, PrefixAnswer]
    """By probe of `FLOOR_PROBES`: the caches in bfloat16, kept as float32."""

    @cached_property
    def floor(self) -> CacheFloor:
        """The noise floor of each layer: the worse of its probes."""

        def layers(side: Callable[[PrefixAnswer], np.ndarray]) -> tuple[float, ...]:
            by_probe = [
                [
                    relative_rms(rounded[sound.mask], exact[sound.mask])
                    for rounded, exact in zip(side(self.served[name]), side(sound), strict=True)
                ]
                for name, sound in self.caches.items()
                if name in self.served
            ]
            return tuple(max(floors) for floors in zip(*by_probe, strict=True))

        return CacheFloor(keys=layers(lambda cache: cache.keys), values=layers(lambda cache: cache.values))

    def probe(self, name: str) -> Probe:
        """The probe of that name."""
        return next(probe for probe in self.probes if probe.name == name)


@dataclass(frozen=True, eq=False)
class Reference:
    """Both halves: all that the gates need."""

    facts: ProbeFacts
    probes: tuple[Probe, ...]
    caches: Mapping[str, PrefixAnswer]
    """By probe."""
    actions: Mapping[str, np.ndarray]
    """By probe: (rows, T, A) float32, normalised, decoded on the probe's cache."""
    controls: Mapping[str, np.ndarray]
    """By the name in `CONTROLS`: (1, T, A) float32, the damaged decoder's actions on the control rows."""
    floor: NoiseFloor

    def probe(self, name: str) -> Probe:
        """The probe of that name."""
        return next(probe for probe in self.probes if probe.name == name)
