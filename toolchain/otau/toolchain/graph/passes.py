"""Running passes, each proved on a twin.

A full-size graph reads 12 GB of weights each time that it runs, so it is not run after every pass. Its twin
is the same policy with narrow layers and random weights, exported the same way; both go through the same
passes in step. After each, both must hold the same operators, and the twin must compute what it computed
before, in ONNX Runtime with its own optimisations off.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from otau.runtime.errors import GateError
from otau.toolchain.graph.attention import BoundMaskFill, RequireConcatRotary, RequireNoHeadExpansion
from otau.toolchain.graph.fuse import FuseSiblingProducts
from otau.toolchain.graph.precision import StoreWeightsAs
from otau.toolchain.graph.simplify import SIMPLIFY, count_nodes
from otau.toolchain.graph.transposes import StraightenKeyTransposes
from otau.toolchain.graph.weights import weight_bytes

__all__ = ["PASS_LIMIT", "STORE_LIMIT", "PassReport", "graph_passes", "run_passes"]

PASS_LIMIT = 1e-6
"""Largest error of a pass, relative to the scale of an output: max |a|, at least 1."""

STORE_LIMIT = 0.1
"""The same for `StoreWeightsAs`, which rounds on purpose; the bundle's gates judge by how much."""

_Answer = Callable[[ir.Model], Mapping[str, np.ndarray]]
"""Runs a graph on a probe; gives what must not change, by name."""


@dataclass(frozen=True)
class PassReport:
    """What a pass did to a graph."""

    name: str
    nodes_before: int
    nodes_after: int
    bytes_before: int
    """Of all initializers."""
    bytes_after: int
    error: float
    """Of the twin against itself before the pass, relative to scale; 0 where the pass changed nothing."""
    seconds: float


def graph_passes(
    *, fuse: bool = False, store: ir.DataType | None = None
) -> tuple[ir.passes.InPlacePass, ...]:
    """The passes of a graph, in order.

    Args:
        fuse: Multiply by query, key and value weights at once, and by gate and up.
        store: FLOAT16 or BFLOAT16 to store weights in 16 bits; None leaves float32.
    """
    return (
        *SIMPLIFY,
        StraightenKeyTransposes(),
        RequireConcatRotary(),
        RequireNoHeadExpansion(),
        BoundMaskFill(),
        *([FuseSiblingProducts()] if fuse else []),
        *([StoreWeightsAs(store)] if store is not None else []),
    )


def run_passes(
    model: ir.Model,
    twin: ir.Model,
    passes: Sequence[ir.passes.InPlacePass],
    answer: _Answer,
    where: str = "graph",
) -> list[PassReport]:
    """Run passes on a graph and on its twin, in place, and check each.

    Args:
        model: The graph; none of its weights is read.
        twin: The same program of a narrow policy; of a small one, the graph itself.
        passes: In order.
        answer: Runs the twin on a probe.
        where: Name of the graph, for messages.

    Returns:
        One report a pass.

    Raises:
        GateError: A pass failed its own conditions, made graph and twin differ, or changed what the twin
            computes; the message names it and those before it.
    """
    reports: list[PassReport] = []
    reference = answer(twin)
    for step in passes:
        name = type(step).__name__

        def refuse(problem: str, name: str = name, **details: object) -> GateError:
            done = ", ".join(report.name for report in reports) or "no other pass"
            return GateError(f"the pass {name} {problem}", where=f"{where} (after {done})", **details)

        start = time.perf_counter()
        nodes, size = count_nodes(model), weight_bytes(model)
        try:
            modified = step(model).modified
            if twin is not model:
                modified = step(twin).modified or modified
        except ir.passes.InvariantError as error:
            raise refuse("failed its own check", got=error) from error
        given, wanted = _operators(model), _operators(twin)
        if given != wanted:
            raise refuse(
                "changed the graph and its twin in different ways",
                expected=dict(wanted - given),
                got=dict(given - wanted),
            )
        error = 0.0
        if modified:
            result = answer(twin)
            error = _largest_error(result, reference)
            limit = STORE_LIMIT if isinstance(step, StoreWeightsAs) else PASS_LIMIT
            if not error <= limit:
                raise refuse(
                    "changed what the graph computes", expected=f"error <= {limit:g}", got=f"{error:.3g}"
                )
            reference = result
        seconds = round(time.perf_counter() - start, 3)
        reports.append(PassReport(name, nodes, count_nodes(model), size, weight_bytes(model), error, seconds))
    return reports


def _operators(model: ir.Model) -> Counter[str]:
    # Not the constants: where two sizes happen to be equal, the exporter writes one constant for both.
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return Counter(node.op_type for node in nodes if node.op_type != "Constant")


def _largest_error(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Largest error of any output relative to its scale; another shape or a number not finite is infinite."""
    if got.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, reference in wanted.items():
        array = got[name]
        if array.shape != reference.shape or not np.isfinite(array).all():
            return float("inf")
        scale = max(1.0, float(np.abs(reference).max(initial=0.0)))
        difference = np.abs(array.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0)
        worst = max(worst, float(difference) / scale)
    return worst
