"""What a checkpoint can be compiled for, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from otau.runtime.errors import UsageError, nearest_name

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """A kind of machine, and how a bundle runs on it."""

    name: str
    engine: str
    """Name of the runtime's engine."""
    precisions: tuple[str, ...]
    """The first is the default. What is not fp32 is how weights are stored; this target computes in fp32."""
    fused: frozenset[str] = frozenset()
    """The graphs in which multiplying by sibling weights at once pays."""


TARGETS = {target.name: target for target in (Target("cpu", "onnxruntime", ("fp32", "bf16", "fp16")),)}
"""Targets by name."""


def find_target(name: str, precision: str | None) -> tuple[Target, str]:
    """The target of that name, and the precision to use on it.

    Raises:
        UsageError: There is no such target, or it has no such precision.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}", where="--target", fix=nearest_name(name, TARGETS))
    target = TARGETS[name]
    precision = precision or target.precisions[0]
    if precision not in target.precisions:
        raise UsageError(
            f"the target {name} has no precision {precision!r}",
            where="--precision",
            fix=nearest_name(precision, target.precisions),
        )
    return target, precision
