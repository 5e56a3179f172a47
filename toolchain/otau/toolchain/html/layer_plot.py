"""Errors of every layer's K and V, and errors of one kind beside another, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from otau.toolchain.html.elements import Markup, svg, tag
from otau.toolchain.html.numbers import error_text, is_finite
from otau.toolchain.html.scales import LinearScale, LogScale

__all__ = ["Series", "compare_magnitudes", "plot_layers"]

_WIDTH, _HEIGHT = 720.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 12.0, 34.0, 44.0


@dataclass(frozen=True)
class Series:
    """An error of each layer."""

    name: str
    kind: str
    """A class of the stylesheet: colour and dash."""
    values: Sequence[float | None]


def _power(exponent: int) -> str:
    return f"1e{exponent}" if exponent else "1"


def _marker(x: float, y: float, value: float | None, size: float, kind: str) -> Markup:
    if not is_finite(value):
        cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
        return tag("path", d=cross, class_=f"{kind} cross")
    shape = "open" if value <= 0 else "dot"
    if kind.endswith("k"):
        return tag("circle", cx=x, cy=y, r=size, class_=f"{kind} {shape}")
    return tag("rect", x=x - size, y=y - size, width=2 * size, height=2 * size, class_=f"{kind} {shape}")


def _curve(series: Series, x: LinearScale, y: LogScale, size: float) -> list[Markup]:
    """A line through what is positive and finite, and a marker on each layer."""
    line, pen = [], "M"
    for layer, value in enumerate(series.values):
        drawable = is_finite(value) and value > 0
        if drawable:
            line.append(f"{pen}{x(layer):.1f} {y(value):.1f}")
        pen = "L" if drawable else "M"
    markers = [
        _marker(x(layer), y(value), value, size, series.kind) for layer, value in enumerate(series.values)
    ]
    return [tag("path", d="".join(line), class_=f"{series.kind} curve"), *markers]


def _legend(series: Sequence[Series]) -> list[Markup]:
    keys: list[Markup] = []
    left = _LEFT
    for each in series:
        keys += [
            tag("path", d=f"M{left} 12h28", class_=f"{each.kind} curve"),
            _marker(left + 14, 12, 1.0, 3, each.kind),
            tag("text", each.name, x=left + 34, y=16),
        ]
        left += 52 + 6.6 * len(each.name)
    return keys


def plot_layers(title: str, series: Sequence[Series], limit: float | None) -> Markup:
    """A logarithmic plot of errors over layers, with the limit as a line.

    An error of exactly 0 is an open marker at the bottom, one that is not finite a cross at the top.
    """
    layers = max((len(each.values) for each in series), default=0)
    values = [value for each in series for value in each.values]
    x = LinearScale(0, max(layers - 1, 0), _LEFT + 12, _WIDTH - _RIGHT - 12)
    y = LogScale.over([*values, limit], _HEIGHT - _BOTTOM, _TOP, gap=20)
    size = 3.0 if layers <= 48 else 2.0
    grid = [
        (
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=place, y2=place, class_="grid"),
            tag("text", label, x=_LEFT - 6, y=place + 4, text_anchor="end"),
        )
        for place, label in [
            *((place, _power(exponent)) for place, exponent in y.ticks()),
            *([(y.zero, "0")] if 0 in values else []),
        ]
    ]
    ticks = [
        tag("text", str(layer), x=x(layer), y=_HEIGHT - _BOTTOM + 17, text_anchor="middle")
        for layer in x.whole_ticks(20)
    ]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return svg(
        title,
        _WIDTH,
        _HEIGHT,
        grid,
        ticks,
        tag("text", "layer", x=_WIDTH / 2, y=_HEIGHT - 8, text_anchor="middle"),
        tag("text", "relative error", transform=f"translate(13 {middle}) rotate(-90)", text_anchor="middle"),
        _limit(limit, y),
        [_curve(each, x, y, size) for each in series],
        _legend(series),
        class_="wide",
    )


def _limit(limit: float | None, y: LogScale) -> list[Markup]:
    if not is_finite(limit) or limit <= 0:
        return []
    place, right = y(limit), _WIDTH - _RIGHT
    text = f"limit {error_text(limit)}"
    return [
        tag("line", x1=_LEFT, x2=right, y1=place, y2=place, class_="limit"),
        tag("text", text, x=right - 2, y=place - 5, text_anchor="end", class_="strong"),
    ]


def compare_magnitudes(title: str, rows: Sequence[tuple[str, float | None]]) -> Markup:
    """Named magnitudes, one below the other, on one logarithmic axis."""
    left, height = 250.0, 24.0 * len(rows) + 40
    scale = LogScale.over([value for _, value in rows], left, _WIDTH - 70)
    ticks = [
        (
            tag("line", x1=x, x2=x, y1=4, y2=height - 34, class_="grid"),
            tag("text", _power(exponent), x=x, y=height - 20, text_anchor="middle"),
        )
        for x, exponent in scale.ticks()
    ]
    drawn = []
    for index, (name, value) in enumerate(rows):
        y, x = 24.0 * index + 16, scale(value)
        drawn += [
            tag("text", name, x=left - 10, y=y + 4, text_anchor="end"),
            tag("line", x1=left, x2=x, y1=y, y2=y, class_="stem"),
            _marker(x, y, value, 4, "line-k"),
            tag("text", error_text(value), x=x + 9, y=y + 4, class_="strong"),
        ]
    axis = tag("text", "relative error of the action chunk", x=(left + _WIDTH - 70) / 2, y=height - 4)
    return svg(title, _WIDTH, height, ticks, drawn, tag("g", axis, text_anchor="middle"), class_="wide")
