"""What the page says of accuracy: gates, errors of the KV cache and of the actions, noise floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from otau.toolchain.html.bars import HeadroomBars, headroom_text
from otau.toolchain.html.elements import Child, figure, number_cell, number_head, table, tag
from otau.toolchain.html.heat_map import heat_map
from otau.toolchain.html.layer_plot import Series, compare_magnitudes, plot_layers
from otau.toolchain.html.multiples import chunk_multiples
from otau.toolchain.html.numbers import error_text, is_finite

__all__ = [
    "action_error_section",
    "chunk_section",
    "gates_section",
    "kv_error_section",
    "noise_floor_section",
]


def gates_section(report: Mapping[str, Any]) -> Child:
    """Value, limit and headroom of each gate; None if no gate was run."""
    gates = report.get("gates")
    if not gates:
        return None
    bars = HeadroomBars(gates)

    def row(gate: Mapping[str, Any]) -> list[Child]:
        control = {True: "yes", False: tag("td", "NO", class_="failed-word")}
        return [
            gate["name"],
            "passed" if gate.get("passed") else tag("td", "FAILED", class_="failed-word"),
            number_cell(error_text(gate.get("value"))),
            number_cell(error_text(gate.get("limit"))),
            number_cell(headroom_text(gate)),
            tag("td", bars.bar(gate)),
            control.get(gate.get("control_failed"), "not run"),
            tag("td", gate.get("metric"), class_="long"),
        ]

    columns = ["gate", "verdict", *map(number_head, ("value", "limit", "headroom"))]
    columns += [["times below the limit", bars.axis()], "control failed", "metric"]
    note = "Headroom is limit / value. The negative control, a damaged weight, must fail the gate."
    return table(note, columns, map(row, gates))


def kv_error_section(report: Mapping[str, Any]) -> Child:
    """The error of each layer's K and V, beside the noise floor if it is known; None if not measured."""
    error = report.get("kv_error")
    if not error:
        return None
    floor = report.get("noise_floor") or {}
    series = [
        Series(name, kind, values)
        for name, kind, values in (
            ("bf16 K", "floor-k", floor.get("keys")),
            ("bf16 V", "floor-v", floor.get("values")),
            ("compiled K", "line-k", error.get("keys")),
            ("compiled V", "line-v", error.get("values")),
        )
        if values
    ]
    if not any(each.kind.startswith("line") for each in series):
        return None
    said = "Compiled: largest error of a layer, relative to its scale (its largest magnitude, at least 1)."
    if len(series) > 2:
        said += " bf16: the noise floor, relative RMS of a run in bf16 against fp32, which is another metric."
    drawn = [value for each in series for value in each.values]
    if 0 in drawn:
        said += " Open marker at the bottom: exactly 0."
    if not all(map(is_finite, drawn)):
        said += " Cross at the top: not finite."
    return figure(plot_layers("error of K and V in each layer", series, error.get("limit")), said)


def action_error_section(report: Mapping[str, Any]) -> Child:
    """The error of each step and dimension of the action chunk; None if not measured."""
    error = report.get("action_error") or {}
    steps = error.get("steps_by_dims")
    if not steps or not steps[0]:
        return None
    picture, bundle = heat_map("action error over steps and dimensions", steps, error.get("limit"))
    cells = [(value, step, dim) for step, row in enumerate(steps) for dim, value in enumerate(row)]
    lost = sum(not is_finite(value) for value, *_ in cells)
    said = "Error relative to the actions' scale (their largest magnitude, at least 1)."
    if lost < len(cells):
        largest, step, dim = max(cell for cell in cells if is_finite(cell[0]))
        said += f" The largest is {error_text(largest)}, at step {step} of dimension {dim}."
    if lost:
        said += f" {lost:,} of {len(cells):,} are not finite."
    if bundle > 1:
        said += f" A column is the largest of {bundle} steps."
    return figure(picture, said)


def chunk_section(report: Mapping[str, Any]) -> Child:
    """One action chunk by PyTorch and compiled; None if the report has none."""
    chunk = report.get("chunk") or {}
    reference, compiled = chunk.get("reference"), chunk.get("compiled")
    if not reference or not compiled or not reference[0]:
        return None
    probe = f"Probe {chunk['probe']}: n" if chunk.get("probe") else "N"
    said = (
        f"{probe}ormalised actions over the steps of one chunk [control ticks], each dimension on its own "
        "scale. Broad band: PyTorch. Thin line: compiled; where it leaves the band, they differ, by Δ."
    )
    return [tag("p", said, class_="note"), chunk_multiples(reference, compiled)]


def _largest(errors: Iterable[float | None]) -> float:
    return max(error if is_finite(error) else math.inf for error in errors)


def noise_floor_section(report: Mapping[str, Any]) -> Child:
    """The noise floor, beside the compiled graphs' error and limit; None if not measured."""
    floor = report.get("noise_floor")
    if not floor:
        return None
    action_error = report.get("action_error") or {}
    errors = [value for row in action_error.get("steps_by_dims") or [] for value in row]
    rows = [
        ("compiled, largest error", _largest(errors) if errors else None),
        ("limit", action_error.get("limit")),
        ("bf16 noise floor, relative RMS", floor.get("actions")),
        ("spread from seed to seed", floor.get("seed_spread")),
    ]
    known = [(name, value) for name, value in rows if value is not None]
    said = "The bf16 noise floor is this checkpoint's own policy in bf16 against itself in fp32."
    layers = [("K", floor.get("keys")), ("V", floor.get("values"))]
    if worst := [f"{name} {error_text(_largest(values))}" for name, values in layers if values]:
        said += f" Largest over the layers: {', '.join(worst)}."
    picture = compare_magnitudes("magnitudes of errors of the action chunk", known) if known else None
    return figure(picture, said)
