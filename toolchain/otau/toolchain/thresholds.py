"""The limits of every gate, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from otau.toolchain.gate.answers import NoiseFloor

__all__ = [
    "CONTROL_DAMAGE",
    "CONTROL_FACTOR",
    "FP32",
    "MAX_RELATIVE",
    "NOISE_FLOORS",
    "RELATIVE_RMS",
    "SEED_FLOORS",
    "SEED_SHARE",
    "GateLimit",
    "GateLimits",
    "action_allowance",
    "gate_limits",
    "prefix_limit",
]

MAX_RELATIVE = "max |error| / max(1, max |reference|)"
RELATIVE_RMS = "relative RMS error of the actions"
NOISE_FLOORS = "relative RMS error of a layer's K or V, in noise floors"

CONTROL_DAMAGE = 0.01
"""How much the negative controls scale a weight, where the limit is that of fp32."""
CONTROL_FACTOR = 4.0
"""By how much the damage of a control exceeds the limit of a lower precision: what passes is less than one
limit away from the sound answer, so it is more than three away from the damaged one."""
SEED_SHARE = 0.5
"""With `--allow seed`: largest action error as a share of the distance between two noise seeds."""
SEED_FLOORS = 10.0
"""With `--allow seed`: how many noise floors K and V may be off."""


@dataclass(frozen=True)
class GateLimit:
    """What a gate measures, and the largest value that passes."""

    metric: str
    """One of this module's three."""
    value: float


@dataclass(frozen=True)
class GateLimits:
    """The limits of the gates of a bundle."""

    prefix: GateLimit
    """On K and V of every layer."""
    decoder: GateLimit
    """On the actions, given the reference's own cache."""
    actions: GateLimit
    """On the actions at the end of the chain."""


FP32 = GateLimits(
    prefix=GateLimit(MAX_RELATIVE, 1e-5),
    decoder=GateLimit(MAX_RELATIVE, 2e-6),
    actions=GateLimit(MAX_RELATIVE, 2e-6),
)
"""The limits of graphs in fp32."""


def action_allowance(floor: NoiseFloor, allow: Literal["seed"] | None) -> float:
    """Largest relative RMS error of the actions in a lower precision."""
    return floor.actions if allow is None else max(floor.actions, SEED_SHARE * floor.seed_spread)


def prefix_limit(precision: str, allow: Literal["seed"] | None) -> GateLimit:
    """The limit of K and V in a precision; any but `fp32` is a lower one."""
    if precision == "fp32":
        return FP32.prefix
    return GateLimit(NOISE_FLOORS, 1.0 if allow is None else SEED_FLOORS)


def gate_limits(
    floor: NoiseFloor, *, prefix: str, decoder: str, allow: Literal["seed"] | None = None
) -> GateLimits:
    """The limits for a bundle of these precisions.

    Args:
        floor: Of this checkpoint.
        prefix: Precision of the prefix graph; any but `fp32` is a lower one.
        decoder: Precision of ingest and decoder.
        allow: `seed` lets actions be as far off as half the distance between two noise seeds, and K and V
            ten noise floors.
    """
    actions = GateLimit(RELATIVE_RMS, action_allowance(floor, allow))
    return GateLimits(
        prefix=prefix_limit(prefix, allow),
        decoder=FP32.decoder if decoder == "fp32" else actions,
        actions=FP32.actions if prefix == decoder == "fp32" else actions,
    )
