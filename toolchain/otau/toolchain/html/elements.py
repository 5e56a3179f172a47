"""HTML and SVG elements: escaped and balanced by construction.

Text becomes HTML in `tag` alone, so no name, path or command can become anything but text.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TypeAlias

__all__ = ["Child", "Markup", "figure", "number_cell", "number_head", "svg", "table", "tag"]


class Markup(str):
    """HTML that `tag` made."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
"""What an element may hold: text, which is escaped, markup, nothing, or several of these."""

_VOID = {"meta"}
# Closed in place where they are empty; in HTML proper that would leave them open.
_SHAPES = {"circle", "line", "path", "rect"}


def _visible(text: str) -> str:
    """Text without what is invisible in it.

    Control characters, halves of surrogate pairs (file names that are not UTF-8 have them) and the marks that
    turn the direction of writing become escapes that can be seen and encoded.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _html(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return html.escape(_visible(child), quote=False)
    return "".join(_html(each) for each in child)


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return html.escape(_visible(value))
    return f"{value:.1f}".removesuffix(".0")


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        name: Of the element; from code, never from data.
        children: Text is escaped; markup is not.
        attributes: `class_` is `class`, `font_size` is `font-size`; numbers are rounded to a tenth, None is
            left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    if name in _SHAPES and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{_html(children)}</{name}>")


def svg(title: str, width: float, height: float, *children: Child, class_: str | None = None) -> Markup:
    """A picture with its title, which is what a screen reader says; sizes in CSS pixels."""
    return tag(
        "svg",
        tag("title", title),
        *children,
        role="img",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        class_=class_,
    )


def figure(picture: Child, caption: Child) -> Markup:
    """A picture that scrolls sideways where the screen is narrow, and its caption."""
    return tag("figure", tag("div", picture, class_="scroll"), tag("figcaption", caption))


def number_cell(text: str) -> Markup:
    """A table's cell with a number, aligned to the right."""
    return tag("td", text, class_="number")


def number_head(text: str) -> Markup:
    """What stands at the head of a column of numbers."""
    return tag("div", text, class_="number")


def table(
    caption: str, columns: Sequence[Child], rows: Iterable[Sequence[Child]], foot: Sequence[Child] = ()
) -> Markup:
    """A table whose first column names the rows.

    A cell of plain text is a number or a word and does not wrap; `tag("td", ...)` is taken as it is.
    """

    def cell(child: Child) -> Markup:
        if isinstance(child, Markup) and child.startswith("<td"):
            return child
        return tag("td", child)

    def row(cells: Sequence[Child]) -> Markup:
        return tag("tr", tag("th", cells[0], scope="row"), [cell(each) for each in cells[1:]])

    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("span", caption)),
            tag("thead", tag("tr", [tag("th", column, scope="col") for column in columns])),
            tag("tbody", [row(cells) for cells in rows]),
            tag("tfoot", row(foot)) if foot else None,
        ),
        class_="scroll",
    )
