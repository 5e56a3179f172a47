"""Numbers as a person reads them."""

from __future__ import annotations

import math
from typing import TypeGuard

__all__ = ["bytes_text", "count_text", "duration", "error_text", "is_finite", "memory", "times"]

_INFINITE = 1e30
"""Stands for infinity and NaN in a report, which JSON has no numbers for."""


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a value of the report is a number: null, NaN, infinity and 1e30, their stand-in, are not."""
    return value is not None and math.isfinite(value) and abs(value) < _INFINITE


def error_text(value: float | None) -> str:
    """An error or an action: `0.82`, `1.2e-7`, `0`, `not finite`."""
    if not is_finite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def times(ratio: float) -> str:
    """A ratio: `83x`, `1.4x`, `0.02x`."""
    return f"{ratio:,.0f}x" if 9.95 <= ratio < 1e6 else f"{error_text(float(f'{ratio:.2g}'))}x"


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    """Three digits and a unit; the first unit without a fraction."""
    size, index = float(value), 0
    while abs(size) >= step * 0.9995 and index < len(units) - 1:
        size, index = size / step, index + 1
    digits = 0 if index == 0 or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {units[index]}".strip()


def bytes_text(value: float | None) -> str:
    """A size on disk: `11.3 GB`, decimal."""
    return "" if value is None else _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory(mebibytes: float | None) -> str:
    """A size in memory, given in MiB: `812 MiB`, `15.6 GiB`."""
    return "" if mebibytes is None else _scaled(mebibytes, 1024, ("MiB", "GiB", "TiB"))


def count_text(value: float | None) -> str:
    """A number of parameters: `3.36 B`, `412 M`, `96`."""
    return "" if value is None else _scaled(value, 1000, ("", "k", "M", "B"))


def duration(seconds: float | None) -> str:
    """A time: `34 ms`, `1.2 s`, `4 min 12 s`, `1 h 02 min`."""
    if seconds is None:
        return ""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
