"""The letterbox at any size, and the pictures it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from otau.runtime.errors import UsageError
from otau.runtime.images import letterbox, letterbox_size, pixels_from_image

SIZES = st.integers(1, 40)


@given(SIZES, SIZES, SIZES, SIZES)
def test_the_picture_fills_the_lower_right_and_the_rest_is_zero(from_height, from_width, height, width):
    ratio = max(from_width / width, from_height / height)
    assume(min(from_height, from_width) / ratio >= 1)
    inside = letterbox_size(from_height, from_width, height, width)
    frame = letterbox(np.ones((1, 3, from_height, from_width), np.float32), height, width)
    assert frame.shape == (1, 3, height, width)
    picture = frame[:, :, height - inside[0] :, width - inside[1] :]
    np.testing.assert_allclose(picture, 1, atol=1e-6)
    assert frame.sum() == pytest.approx(picture.sum())
    # One side is filled, but for the pixel that truncating may cost: 9 / (9 / 7) is a little less than 7.
    assert inside[0] >= height - 1 or inside[1] >= width - 1


@given(SIZES, SIZES)
def test_values_stay_within_the_pictures(height, width):
    image = np.random.default_rng(0).random((1, 3, 20, 20), np.float32)
    assume(min(letterbox_size(20, 20, height, width)) >= 1)
    frame = letterbox(image, height, width)
    assert frame.min() >= 0
    assert frame.max() <= image.max() + 1e-6


def test_bytes_and_floats_of_the_same_picture_agree():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    floats = np.moveaxis(image, 2, 0).astype(np.float32) / 255
    for form in (image, image[None], floats, floats[None]):
        pixels = pixels_from_image(form, 16, 16)
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels, pixels_from_image(image, 16, 16), atol=1e-6)


def test_range_is_minus_one_to_one():
    image = np.zeros((4, 4, 3), np.uint8)
    image[0] = 255
    pixels = pixels_from_image(image, 4, 4)
    assert (pixels[:, :, 0] == 1).all()
    assert (pixels[:, :, 1:] == -1).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), "shape"),
        (np.zeros((3, 4, 4), np.uint8), "shape"),
        (np.zeros((4, 4, 3), np.float32), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros((4, 4, 3), np.int32), "dtype"),
        (np.full((3, 4, 4), 255, np.float32), "outside"),
        (np.full((3, 4, 4), -0.5, np.float32), "outside"),
        (np.full((3, 4, 4), np.nan, np.float32), "NaN"),
        (np.zeros((1, 1000, 3), np.uint8), "too narrow"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_name(image, message):
    with pytest.raises(UsageError, match=message) as caught:
        pixels_from_image(image, 8, 8, name="wrist")
    assert "wrist" in str(caught.value)
