"""Normalisation beyond the golden cases: round trips of any statistics, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from otau.runtime.errors import BundleError, UsageError
from otau.runtime.normalise import Normaliser, find_head, round_to_bfloat16

KEYS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILE": ("q01", "q99")}
HEADS, WIDTH = 2, 3
VALUES = st.floats(-100, 100, width=32)


def normaliser(mode, first, second, **changes):
    keys = KEYS.get(mode, ())
    options = {"eps": 1e-6, "centre_degenerate": True} | changes
    return Normaliser(mode, dict(zip(keys, (first, second), strict=False)), **options)


@given(
    mode=st.sampled_from(sorted(KEYS)),
    first=npst.arrays(np.float32, (HEADS, WIDTH), elements=VALUES),
    spread=npst.arrays(np.float32, (HEADS, WIDTH), elements=st.floats(np.float32(0.1).item(), 50, width=32)),
    values=npst.arrays(np.float32, (4, 2, WIDTH), elements=VALUES),
    centre=st.booleans(),
)
def test_unnormalise_undoes_normalise(mode, first, spread, values, centre):
    second = spread if mode == "MEAN_STD" else first + spread
    codec = normaliser(mode, first, second, centre_degenerate=centre)
    head = np.array([0, 1, 1, 0])
    back = codec.unnormalise(codec.normalise(values, head), head)
    np.testing.assert_allclose(back, values, rtol=1e-5, atol=2e-4)


@given(npst.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_bfloat16_rounding_is_idempotent_and_nearest(values):
    rounded = round_to_bfloat16(values)
    np.testing.assert_array_equal(round_to_bfloat16(rounded), rounded)
    np.testing.assert_array_equal(np.isnan(rounded), np.isnan(values))
    assert not (rounded.view(np.uint32)[~np.isnan(values)] & 0xFFFF).any()
    normal = np.isfinite(rounded) & (np.abs(values) > 1e-30)
    error = np.abs(rounded[normal].astype(np.float64) - values[normal])
    assert np.all(error <= np.abs(values[normal]) * 2.0**-8)


def test_bfloat16_ties_go_to_even():
    ties = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    assert round_to_bfloat16(ties).view(np.uint32).tolist() == [0x3F800000, 0x3F820000]


def test_each_element_takes_the_row_of_its_head():
    codec = normaliser("MEAN_STD", np.float32([[0], [10]]), np.float32([[1], [2]]), eps=0.0)
    np.testing.assert_allclose(codec.normalise(np.float32([[4], [4]]), np.array([1, 0])), [[-3], [4]])


@pytest.mark.parametrize(("centre", "expected"), [(True, 0), (False, -1)])
def test_a_constant_dimension_goes_to_the_middle_or_to_the_edge(centre, expected):
    constant = np.float32([[5]])
    codec = normaliser("MIN_MAX", constant, constant, centre_degenerate=centre)
    np.testing.assert_allclose(codec.normalise(constant, np.array([0])), expected, atol=2e-6)


@given(
    mode=st.sampled_from(sorted(KEYS)),
    version=st.sampled_from([None, 0, 1]),
    constant=VALUES,
    value=VALUES,
)
def test_a_dimension_without_a_spread_is_shifted_and_not_blown_up(mode, version, constant, value):
    """Of every mode and version: its denominator becomes 1, so values differ by what they are apart."""
    first = np.float32([[constant]])
    codec = normaliser(
        mode,
        first,
        np.zeros_like(first) if mode == "MEAN_STD" else first,
        eps=1e-8 if version == 0 else 1e-6,
        centre_degenerate=version == 1,
    )
    head = np.array([0])
    middle = codec.normalise(first, head)
    np.testing.assert_allclose(middle, 0 if mode == "MEAN_STD" or version == 1 else -1, atol=2e-6)
    moved = codec.normalise(np.float32([[value]]), head) - middle
    distance = (value - constant) * (1 if mode == "MEAN_STD" else 2)
    np.testing.assert_allclose(moved, distance, rtol=1e-5, atol=1e-4)


def test_without_an_epsilon_a_dimension_must_have_a_spread():
    spread = np.float32([[1, 1], [1, 0]])
    codec = normaliser("MEAN_STD", np.zeros_like(spread), spread + np.float32([[0, 0], [0, 2]]), eps=0.0)
    np.testing.assert_array_equal(codec.normalise(np.float32([[3, 4]]), np.array([1])), [[3, 2]])
    with pytest.raises(BundleError, match=r"no scale to divide by(.|\n)*\(1, 1\)"):
        normaliser("MEAN_STD", np.zeros_like(spread), spread, eps=0.0)


def test_a_head_is_found_by_its_name_or_number():
    heads = ("arm::joint", "arm::pose", "0")
    assert [find_head(name, heads, "") for name in ("arm::pose", "1", "0", "2")] == [1, 1, 2, 2]
    for name in ("arm::jont", "3", "-1", "1.0", ""):
        with pytest.raises(UsageError, match=r"no such normalisation head(.|\n)*--norm-head"):
            find_head(name, heads, "--norm-head")
    with pytest.raises(UsageError, match="did you mean 'arm::joint'"):
        find_head("arm::jont", heads, "--norm-head")


def test_identity_changes_nothing_and_takes_any_width():
    codec = normaliser("IDENTITY", None, None)
    values = np.float32([[1, 2, 3, 4]])
    np.testing.assert_array_equal(codec.normalise(values, np.array([0])), values)
    np.testing.assert_array_equal(codec.unnormalise(values, np.array([0])), values)


def test_a_row_that_is_not_there_is_refused():
    codec = normaliser("MEAN_STD", np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32))
    for head in (2, -1):
        with pytest.raises(UsageError, match="no such row"):
            codec.normalise(np.zeros((1, 1), np.float32), np.array([head]))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": np.zeros((1, 2), np.float32)}, "missing"),
        ({"mean": np.zeros((1, 2)), "std": np.zeros((1, 3))}, "misshapen"),
        ({"mean": np.zeros((1, 2)), "std": np.full((1, 2), np.inf)}, "std of the arm is not finite"),
    ],
)
def test_bad_statistics_are_refused(statistics, message):
    with pytest.raises(BundleError, match=message):
        Normaliser("MEAN_STD", statistics, eps=1e-6, centre_degenerate=True, name="arm")


def test_another_width_is_refused():
    codec = normaliser("MEAN_STD", np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))
    with pytest.raises(UsageError, match="wrong width"):
        codec.normalise(np.zeros((1, 3), np.float32), np.array([0]))
