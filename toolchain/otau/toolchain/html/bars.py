"""Bars inside a table's cells; the number is always in a cell beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from otau.toolchain.html.elements import Markup, svg, tag
from otau.toolchain.html.numbers import is_finite, times
from otau.toolchain.html.scales import LogScale

__all__ = ["HeadroomBars", "change_bars", "headroom", "headroom_text", "span_bar"]

_WIDTH = 160.0
_MOST = 1e6
"""Headroom beyond it is drawn as it."""


def span_bar(title: str, start: float, end: float, whole: float, kind: str = "bar") -> Markup:
    """A bar from `start` to `end` on an axis from 0 to `whole`, all in one unit; at least a pixel wide."""
    scale = (_WIDTH - 1) / whole if whole > 0 else 0.0
    x, width = start * scale, max((end - start) * scale, 1.0)
    return svg(
        title,
        _WIDTH,
        12,
        tag("line", x1=0, x2=_WIDTH, y1=6, y2=6, class_="track"),
        tag("rect", x=x, y=2, width=width, height=8, class_=kind),
    )


def change_bars(title: str, before: float, after: float, most: float) -> Markup:
    """Two bars, before above after, on an axis from 0 to `most`."""
    scale = _WIDTH / most if most > 0 else 0.0
    return svg(
        title,
        _WIDTH,
        14,
        tag("rect", x=0, y=1, width=max(before * scale, 1.0), height=5, class_="faint"),
        tag("rect", x=0, y=8, width=max(after * scale, 1.0), height=5, class_="bar"),
    )


def headroom(gate: Mapping[str, Any]) -> float:
    """How many times a gate's value is below its limit: below 1 it is over it; 0 if it is not finite."""
    value, limit = gate.get("value"), gate.get("limit")
    if not is_finite(value) or not is_finite(limit):
        return 0.0
    if value <= 0:
        return _MOST
    return min(limit / value, _MOST)


def headroom_text(gate: Mapping[str, Any]) -> str:
    """A gate's headroom: `83x`, `0.02x`, `exact`, `none`."""
    if gate.get("value") == 0:
        return "exact"
    return times(headroom(gate)) if headroom(gate) else "none"


class HeadroomBars:
    """Bars of gates on one logarithmic axis: from the limit to the right, or to the left if over it."""

    def __init__(self, gates: Iterable[Mapping[str, Any]]) -> None:
        """Take the axis from the gates that will be drawn."""
        rooms = [headroom(gate) for gate in gates]
        # What is exact, or not finite, is drawn to the end of the axis and must not stretch it.
        inner = [max(room, 1 / _MOST) for room in rooms if 0 < room < _MOST]
        lowest = [] if all(rooms) else [0.1]
        self.scale = LogScale.over([1.0, 10.0, *lowest, *inner], 8, _WIDTH + 52)

    def axis(self) -> Markup:
        """The axis, for the column's head."""
        ticks = [
            (
                tag("line", x1=x, x2=x, y1=13, y2=17, class_="axis"),
                tag("text", times(10.0**exponent), x=x, y=10, text_anchor="middle"),
            )
            for x, exponent in self.scale.ticks(5)
        ]
        line = tag("line", x1=self.scale.start, x2=self.scale.end, y1=17, y2=17, class_="axis")
        return svg("axis: times below the limit, logarithmic", _WIDTH + 70, 18, line, ticks)

    def bar(self, gate: Mapping[str, Any]) -> Markup:
        """The bar of one gate."""
        room = headroom(gate)
        limit, end = self.scale(1.0), self.scale(room)
        return svg(
            f"headroom: {headroom_text(gate)}",
            _WIDTH + 70,
            14,
            tag(
                "rect",
                x=min(limit, end),
                y=3,
                width=max(abs(end - limit), 1.0),
                height=8,
                class_="bar" if room >= 1 and gate.get("passed") else "bad",
            ),
            tag("line", x1=limit, x2=limit, y1=0, y2=14, class_="limit"),
        )
