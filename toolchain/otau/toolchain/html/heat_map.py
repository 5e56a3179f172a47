"""A heat map of errors over steps and dimensions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from otau.toolchain.html.elements import Markup, svg, tag
from otau.toolchain.html.numbers import error_text, is_finite
from otau.toolchain.html.scales import LinearScale

__all__ = ["NOT_FINITE", "OVER", "ZERO", "heat_map", "level", "level_edges"]

_MOST_COLUMNS = 250
_LEFT, _TOP, _PLOT = 46.0, 20.0, 660.0

ZERO, OVER, NOT_FINITE = 0, 8, 11
"""Levels: exactly 0; from here on above the limit, by more and more; not finite."""


def level_edges(limit: float) -> list[float]:
    """Upper edges of levels 1 to 9: half a decade each up to level 7, the limit, then 10 and 100 times it."""
    return [limit * 10 ** (-half / 2) for half in range(6, -1, -1)] + [limit * 10, limit * 100]


def level(value: float | None, edges: Sequence[float]) -> int:
    """The level of an error, 0 to 11; a larger error is never on a lower level."""
    if not is_finite(value):
        return NOT_FINITE
    return bisect_left(edges, value) + 1 if value > 0 else ZERO


def _cells(levels: list[list[int]], width: float, height: float) -> Markup:
    """One path a level: a page may have 16,000 cells."""
    paths: dict[int, list[str]] = {}
    for column, cells in enumerate(levels):
        for row, shade in enumerate(cells):
            path = paths.setdefault(shade, [])
            path.append(f"M{column} {row}h1v1h-1z")
    place = f"translate({_LEFT:g} {_TOP:g}) scale({width:g} {height:g})"
    drawn = [tag("path", d="".join(path), class_=f"heat-{shade}") for shade, path in sorted(paths.items())]
    return tag("g", drawn, transform=place)


def _legend(levels: set[int], edges: Sequence[float], top: float, limited: bool) -> list[Markup]:
    """A swatch a level, its upper edge below it; what is above the limit only where there is some."""
    shown = [*range(ZERO, OVER), *sorted(each for each in levels if each >= OVER)]
    drawn = []
    for place, shade in enumerate(shown):
        x = _LEFT + 50 * place
        if shade == ZERO:
            text = "0"
        elif shade == NOT_FINITE:
            text = "not finite"
        elif shade == NOT_FINITE - 1:
            text = f"> {error_text(edges[-1])}"
        else:
            text = f"≤ {error_text(edges[shade - 1])}"
        drawn += [
            tag("rect", x=x, y=top, width=48, height=10, class_=f"heat-{shade} swatch"),
            tag("text", text, x=x + 24, y=top + 23, text_anchor="middle"),
        ]
    if limited:
        x = _LEFT + 50 * OVER - 1
        drawn += [
            tag("line", x1=x, x2=x, y1=top - 5, y2=top + 28, class_="limit"),
            tag("text", "limit", x=x - 4, y=top - 6, text_anchor="end", class_="strong"),
        ]
    return drawn


def heat_map(title: str, errors: Sequence[Sequence[float | None]], limit: float | None) -> tuple[Markup, int]:
    """Errors (T, A) as colours, steps to the right and dimensions down.

    Without a limit the colours are relative to the largest error.

    Returns:
        The picture, and how many steps a column holds: it shows the largest error of these.
    """
    steps, dims = len(errors), len(errors[0])
    bundle = -(-steps // _MOST_COLUMNS)
    limited = is_finite(limit) and limit > 0
    finite = [value for row in errors for value in row if is_finite(value)]
    top = limit if limited else max(finite, default=0) or 1.0
    edges = level_edges(top)
    levels = [
        [max(level(row[dim], edges) for row in errors[start : start + bundle]) for dim in range(dims)]
        for start in range(0, steps, bundle)
    ]
    width, height = min(_PLOT / len(levels), 36.0), min(max(420 / dims, 6.0), 18.0)
    right, bottom = _LEFT + width * len(levels), _TOP + height * dims
    # Labels sit in the middle of their cells.
    half = width / 2 / bundle
    x = LinearScale(0, steps - 1, _LEFT + half, _LEFT + width * steps / bundle - half)
    y = LinearScale(0, dims - 1, _TOP + height / 2, bottom - height / 2)
    labels = [
        *(tag("text", f"{t}", x=x(t), y=bottom + 14, text_anchor="middle") for t in x.whole_ticks(14)),
        *(
            tag("text", f"{d}", x=_LEFT - 5, y=y(d) + 4, text_anchor="end")
            for d in y.whole_ticks(max(int((bottom - _TOP) / 14), 1))
        ),
    ]
    axes = [
        tag("text", "step in the chunk [control ticks]", x=_LEFT, y=bottom + 30),
        tag("text", "dimension", x=_LEFT, y=_TOP - 8),
        tag("rect", x=_LEFT, y=_TOP, width=right - _LEFT, height=bottom - _TOP, class_="frame"),
    ]
    legend = _legend({shade for column in levels for shade in column}, edges, bottom + 52, limited)
    cells = _cells(levels, width, height)
    return svg(title, 720, bottom + 80, cells, labels, axes, legend, class_="wide"), bundle
