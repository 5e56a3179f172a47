"""The letterbox at any size, and the pictures it refuses."""

from __future__ import annotations

from fractions import Fraction

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


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([0.0, -1.0]))
def test_centred_the_free_part_is_halved_and_an_odd_pixel_goes_right_and_below(
    from_height, from_width, height, width, fill
):
    ratio = max(from_width / width, from_height / height)
    assume(min(from_height, from_width) / ratio >= 1)
    inside = letterbox_size(from_height, from_width, height, width)
    picture = np.full((1, 3, from_height, from_width), 0.5, np.float32)
    frame = letterbox(picture, height, width, padding="centre", fill=fill)
    is_picture = frame[0, 0] > 0.25
    for axis, (size, kept) in enumerate(zip((height, width), inside, strict=True)):
        filled = np.flatnonzero(is_picture.any(axis=1 - axis))
        before, after = filled[0], size - 1 - filled[-1]
        assert len(filled) == kept
        assert before + after == size - kept
        assert after - before in (0, 1)
    assert (frame[0][:, ~is_picture] == fill).all()


def _triangle_resized(pixels: list[int], size: int) -> list[float]:
    """One row of bytes resized in exact fractions; as in Pillow, without the tips of the triangle."""
    step = Fraction(len(pixels), size)
    reach = max(step, Fraction(1))
    row = []
    for point in range(size):
        centre = (point + Fraction(1, 2)) * step
        first = max(0, int(centre - reach + Fraction(1, 2)))
        last = min(len(pixels), int(centre + reach + Fraction(1, 2)))
        weights = {x: 1 - abs(x + Fraction(1, 2) - centre) / reach for x in range(first, last)}
        value = sum(weight * pixels[x] for x, weight in weights.items()) / sum(weights.values())
        row.append(float(value))
    return row


@given(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.integers(1, 12))
def test_pillows_resizing_is_a_triangle_as_wide_as_a_step(pixels, size):
    assume(letterbox_size(len(pixels), len(pixels), size, size) == (size, size))
    row = np.array(pixels, np.uint8).reshape(1, 1, 1, -1).repeat(3, axis=1).repeat(len(pixels), axis=2)
    frame = letterbox(row, size, size, resize="pillow")[0, 0]
    # Rounded to bytes; the weights have 22 bits, so a tie may fall to either side.
    np.testing.assert_allclose(frame[size // 2] * 255, _triangle_resized(pixels, size), atol=0.501)


@pytest.mark.parametrize("shape", [(480, 640), (360, 640), (256, 256), (100, 100), (241, 333), (640, 480)])
def test_pillows_resizing_is_pillows(shape):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    height, width = letterbox_size(*shape, 224, 224)
    resized = image_module.fromarray(image).resize((width, height), image_module.Resampling.BILINEAR)
    expected = np.zeros((224, 224, 3), np.uint8)
    top, left = (224 - height) // 2, (224 - width) // 2
    expected[top : top + height, left : left + width] = np.asarray(resized)
    got = letterbox(np.moveaxis(image, 2, 0)[None], 224, 224, padding="centre", resize="pillow")[0]
    np.testing.assert_array_equal(np.rint(np.moveaxis(got, 0, 2) * 255), expected)


def test_pillows_resizing_takes_floats_as_bytes():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    floats = (np.moveaxis(image, 2, 0).astype(np.float32) + np.float32(0.4)) / 255
    expected = pixels_from_image(image, 5, 5, resize="pillow")
    np.testing.assert_array_equal(pixels_from_image(floats.clip(0, 1), 5, 5, resize="pillow"), expected)


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
