"""The gate of the prefix: K and V of every layer. Runs without PyTorch.

Its negative control needs no run of a damaged policy: damaging the last layer's value projection by a factor
changes nothing but that layer's V, and by that factor, since it is linear and has no bias (a test asks a
really damaged policy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from otau.runtime.engines import Engine
from otau.runtime.spec import GateResult
from otau.toolchain.gate.answers import CacheFloor, PrefixAnswer, PrefixReference, Reference
from otau.toolchain.gate.metrics import relative_error, relative_rms
from otau.toolchain.gate.parity import LARGEST, judge
from otau.toolchain.gate.probes import CONTROL_PROBE
from otau.toolchain.thresholds import CONTROL_DAMAGE, CONTROL_FACTOR, MAX_RELATIVE, NOISE_FLOORS, GateLimit

__all__ = ["LayerErrors", "PrefixVerdict", "gate_prefix"]


class LayerErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of each layer's K and V, the worst over the probes."""

    keys_max: tuple[float, ...]
    """max |error| / max(1, max |reference|)."""
    keys_rms: tuple[float, ...]
    """Relative RMS."""
    values_max: tuple[float, ...]
    values_rms: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class PrefixVerdict:
    """What the prefix gate found."""

    gate: GateResult
    layers: LayerErrors
    caches: Mapping[str, PrefixAnswer]
    """The compiled caches by probe, for the chain."""


def gate_prefix(engine: Engine, reference: PrefixReference | Reference, limit: GateLimit) -> PrefixVerdict:
    """Judge the prefix: K and V of every layer, on every probe.

    Args:
        engine: Of the prefix graph; it may be closed afterwards.
        reference: The policy's answers; the first half is enough.
        limit: `MAX_RELATIVE`, or `NOISE_FLOORS`, where each layer's K and V is held against its own floor.
    """
    caches = {}
    for probe in reference.probes:
        made = engine.run(probe.prefix)
        caches[probe.name] = PrefixAnswer(made["keys"], made["values"], made["prefix_mask"])

    def error(answers: Mapping[str, PrefixAnswer]) -> float:
        return max(
            _cache_error(caches[name], answer, limit, reference.floor) for name, answer in answers.items()
        )

    broken = {CONTROL_PROBE: _damaged(reference, limit)}
    gate = judge("prefix", limit.value, error, reference.caches, broken, limit.metric)
    return PrefixVerdict(gate, _layer_errors(caches, reference.caches), caches)


def _damaged(reference: PrefixReference | Reference, limit: GateLimit) -> PrefixAnswer:
    """The control probe's cache by a policy whose last value projection is scaled."""
    damage = CONTROL_DAMAGE
    if limit.metric == NOISE_FLOORS:
        damage = CONTROL_FACTOR * limit.value * reference.floor.values[-1]
    cache = reference.caches[CONTROL_PROBE]
    values = cache.values.copy()
    values[-1] *= np.float32(1 + damage)
    return PrefixAnswer(cache.keys, values, cache.mask)


def _cache_error(got: PrefixAnswer, wanted: PrefixAnswer, limit: GateLimit, floor: CacheFloor) -> float:
    """The worst error of any layer's K or V, in the limit's metric."""
    if not np.array_equal(got.mask, wanted.mask) or len(got.keys) != len(wanted.keys):
        return float("inf")
    worst = 0.0
    sides = ((got.keys, wanted.keys, floor.keys), (got.values, wanted.values, floor.values))
    for made, given, floors in sides:
        for one, other, layer_floor in zip(made, given, floors, strict=True):
            if one.shape != other.shape:
                return float("inf")
            one, other = one[wanted.mask], other[wanted.mask]
            if limit.metric == MAX_RELATIVE:
                error = relative_error(one, other)
            else:
                rms = relative_rms(one, other)
                error = rms / layer_floor if layer_floor else float("inf") if rms else 0.0
            worst = max(worst, error)
    return worst


def _layer_errors(got: Mapping[str, PrefixAnswer], wanted: Mapping[str, PrefixAnswer]) -> LayerErrors:
    def worst(
        error: Callable[[np.ndarray, np.ndarray], float], side: Callable[[PrefixAnswer], np.ndarray]
    ) -> tuple[float, ...]:
        by_probe = [
            [
                min(error(one[answer.mask], other[answer.mask]), LARGEST)
                for one, other in zip(side(got[name]), side(answer), strict=True)
            ]
            if side(got[name]).shape == side(answer).shape
            else [LARGEST] * len(side(answer))
            for name, answer in wanted.items()
        ]
        return tuple(max(errors) for errors in zip(*by_probe, strict=True))

    return LayerErrors(
        keys_max=worst(relative_error, lambda cache: cache.keys),
        keys_rms=worst(relative_rms, lambda cache: cache.keys),
        values_max=worst(relative_error, lambda cache: cache.values),
        values_rms=worst(relative_rms, lambda cache: cache.values),
    )
