from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otau.toolchain.html.numbers import bytes_text, count_text, duration, error_text, memory, times
from otau.toolchain.html.scales import LinearScale, LogScale


@given(st.lists(st.floats(1e-29, 1e29), min_size=1), st.floats(1e-29, 1e29), st.floats(1e-29, 1e29))
def test_larger_errors_are_never_lower(values: list[float], a: float, b: float) -> None:
    scale = LogScale.over(values, 300, 10)
    low, high = sorted((a, b))
    assert scale.start >= scale(low) >= scale(high) >= scale.end
    assert 10.0**scale.low <= min(values) * (1 + 1e-9)
    assert 10.0**scale.high >= max(values) * (1 - 1e-9)


def test_a_decade_is_everywhere_as_wide() -> None:
    scale = LogScale.over([1e-7, 1e-3], 0, 100)
    assert [round(scale(10.0**exponent)) for exponent in range(-7, -2)] == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [None, math.nan, math.inf, 1e30], [5e-324], [1.0]])
def test_values_without_a_range_have_a_scale(values: list[float | None]) -> None:
    scale = LogScale.over(values, 0, 100, gap=10)
    assert scale.high > scale.low
    assert all(0 <= place <= 100 for place, _ in scale.ticks())
    assert all(0 <= scale(value) <= 100 for value in values)


def test_zero_has_a_place_of_its_own() -> None:
    scale = LogScale.over([0.0, 1e-6], 200, 20, gap=20)
    assert scale(0.0) == 200
    assert scale(1e-300) == 180
    assert LogScale.over([1e-6], 200, 20, gap=20).start == 200


@given(st.integers(-320, 20), st.integers(1, 300), st.integers(2, 12))
def test_log_ticks_are_few_even_and_rising(low: int, decades: int, most: int) -> None:
    ticks = LogScale(low, low + decades, 0, 100, 0).ticks(most)
    assert 1 <= len(ticks) <= most
    exponents = [exponent for _, exponent in ticks]
    assert exponents == sorted(set(exponents))
    assert len({b - a for a, b in zip(exponents, exponents[1:], strict=False)}) <= 1
    assert all(place == pytest.approx((exponent - low) / decades * 100) for place, exponent in ticks)


@given(st.integers(0, 5000), st.integers(1, 40))
def test_whole_ticks_are_few_even_and_inside(last: int, most: int) -> None:
    ticks = LinearScale(0, last, 0, 100).whole_ticks(most)
    assert ticks[0] == 0
    assert len(ticks) <= most
    assert ticks[-1] <= last
    assert len({b - a for a, b in zip(ticks, ticks[1:], strict=False)}) <= 1


def test_a_linear_scale_clamps_and_survives_a_single_value() -> None:
    scale = LinearScale(0, 10, 0, 100)
    assert [scale(value) for value in (-5, 0, 5, 10, 15)] == [0, 0, 50, 100, 100]
    assert LinearScale(3, 3, 0, 100)(3) == 50


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (error_text(1.2e-7), "1.2e-7"),
        (error_text(1e-5), "1e-5"),
        (error_text(-3.14159e-12), "-3.1e-12"),
        (error_text(0.004), "0.004"),
        (error_text(-0.8251), "-0.825"),
        (error_text(999.9), "1e3"),
        (error_text(0.0), "0"),
        (error_text(-math.inf), "not finite"),
        (error_text(1e30), "not finite"),
        (error_text(None), "not finite"),
        (times(83.2), "83x"),
        (times(9.96), "10x"),
        (times(2.718), "2.7x"),
        (times(12345), "12,345x"),
        (times(0.0123), "0.012x"),
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(34_000), "34.0 kB"),
        (bytes_text(999_999), "1.00 MB"),
        (bytes_text(11_312_000_000), "11.3 GB"),
        (bytes_text(3e15), "3000 TB"),
        (bytes_text(None), ""),
        (memory(812.4), "812 MiB"),
        (memory(1023.9), "1.00 GiB"),
        (memory(15_974), "15.6 GiB"),
        (count_text(3_362_000_000), "3.36 B"),
        (count_text(412_300_000), "412 M"),
        (count_text(96), "96"),
        (count_text(0), "0"),
        (duration(0.0341), "34 ms"),
        (duration(0.9999), "1.0 s"),
        (duration(59.97), "1 min 00 s"),
        (duration(252), "4 min 12 s"),
        (duration(3599.9), "1 h 00 min"),
        (duration(3725), "1 h 02 min"),
        (duration(None), ""),
    ],
)
def test_numbers_are_written_for_people(made: str, text: str) -> None:
    assert made == text
