"""Small multiples: one action chunk by two implementations, a plot for each dimension."""

from __future__ import annotations

from collections.abc import Sequence

from otau.toolchain.html.elements import Markup, svg, tag
from otau.toolchain.html.numbers import error_text, is_finite
from otau.toolchain.html.scales import LinearScale

__all__ = ["chunk_multiples", "largest_difference", "shown_steps"]

_WIDTH, _HEIGHT = 190.0, 92.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 6.0, 6.0, 20.0
_MOST_STEPS = 300

_Line = Sequence["float | None"]
"""An action dimension over the steps of a chunk (T,), normalised; None is not finite."""


def _difference(a: float | None, b: float | None) -> float:
    return abs(a - b) if is_finite(a) and is_finite(b) else float("inf")


def largest_difference(reference: _Line, compiled: _Line) -> tuple[float, int]:
    """The largest difference of two lines (T,), infinite where a value is not finite, and its step."""
    differences = [_difference(a, b) for a, b in zip(reference, compiled, strict=True)]
    largest = max(differences)
    return largest, differences.index(largest)


def shown_steps(reference: _Line, compiled: _Line) -> list[int]:
    """The steps that are drawn: all, or the extremes of each group, of both lines and of their difference."""
    steps = len(reference)
    if steps <= _MOST_STEPS:
        return list(range(steps))
    group = -(-steps * 6 // _MOST_STEPS)
    kept = {0, steps - 1}
    for start in range(0, steps, group):
        inside = range(start, min(start + group, steps))
        for line in (reference, compiled):
            finite = [step for step in inside if is_finite(line[step])]
            kept |= {pick(finite, key=line.__getitem__) for pick in (min, max) if finite}
        kept.add(max(inside, key=lambda step: _difference(reference[step], compiled[step])))
    return sorted(kept)


def _path(line: _Line, steps: list[int], x: LinearScale, y: LinearScale) -> str:
    drawn, pen = [], "M"
    for step in steps:
        value = line[step]
        if is_finite(value):
            # A line of no length has round ends, so that a value between two that are missing is seen.
            drawn.append(f"{pen}{x(step):.1f} {y(value):.1f}" + ("h0" if pen == "M" else ""))
        pen = "L" if is_finite(value) else "M"
    return "".join(drawn)


def _plot(dim: int, reference: _Line, compiled: _Line) -> Markup:
    values = [value for line in (reference, compiled) for value in line if is_finite(value)] or [0.0]
    low, high = min(values), max(values)
    x = LinearScale(0, len(reference) - 1, _LEFT, _WIDTH - _RIGHT)
    y = LinearScale(low, high, _HEIGHT - _BOTTOM - 3, _TOP + 3)
    largest, at = largest_difference(reference, compiled)
    steps = shown_steps(reference, compiled)
    ends = [(y(low), low), (y(high), high)] if high > low else [(y(low), low)]
    difference = f"max difference {error_text(largest)}"
    picture = svg(
        f"dimension {dim}, PyTorch and compiled; {difference} at step {at}",
        _WIDTH,
        _HEIGHT,
        tag("path", d=f"M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}", class_="axis"),
        [tag("text", error_text(v), x=_LEFT - 4, y=place + 4, text_anchor="end") for place, v in ends],
        tag("text", "0", x=_LEFT, y=_HEIGHT - 7, text_anchor="middle"),
        tag("text", "step", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 7, text_anchor="middle"),
        tag("text", str(len(reference) - 1), x=_WIDTH - _RIGHT, y=_HEIGHT - 7, text_anchor="end"),
        tag("path", d=_path(reference, steps, x, y), class_="reference"),
        tag("path", d=_path(compiled, steps, x, y), class_="compiled"),
    )
    caption = [tag("b", f"dimension {dim}"), tag("span", f"max |Δ| {error_text(largest)} at step {at}")]
    return tag("figure", picture, tag("figcaption", caption))


def chunk_multiples(reference: Sequence[_Line], compiled: Sequence[_Line]) -> Markup:
    """Two action chunks (T, A) as A plots: PyTorch a broad band, compiled a thin line on it.

    Raises:
        ValueError: The chunks differ in their shapes.
    """
    columns = zip(zip(*reference, strict=True), zip(*compiled, strict=True), strict=True)
    return tag("div", [_plot(dim, *lines) for dim, lines in enumerate(columns)], class_="multiples")
