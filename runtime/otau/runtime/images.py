"""Camera pictures as the prefix wants them: letterboxed, in [-1, 1]."""

from __future__ import annotations

from typing import Literal

import numpy as np

from otau.runtime.errors import UsageError

__all__ = ["Padding", "Resize", "letterbox", "letterbox_size", "pixels_from_image"]

Padding = Literal["left_top", "centre"]
"""Where a letterbox's free part is: all of it left and above, or in halves, an odd pixel right and below."""

Resize = Literal["bilinear", "pillow"]
"""How a letterboxed picture is made smaller or larger: by its four nearest pixels, without antialiasing, or
as Pillow's BILINEAR does it, with antialiasing, on bytes."""

_RANGE_SLACK = 1e-3
"""How far outside [0, 1] a float picture may reach; bicubic resizers overshoot a little."""

_PILLOW_BITS = 22
"""Bits of Pillow's fixed-point weights (libImaging/Resample.c, PRECISION_BITS)."""


def pixels_from_image(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    name: str = "image",
    padding: Padding = "left_top",
    resize: Resize = "bilinear",
    fill: float = 0.0,
) -> np.ndarray:
    """Checks a picture, letterboxes it and maps it to [-1, 1].

    Args:
        image: RGB, uint8 (h, w, 3) or (B, h, w, 3), or float in [0, 1] (3, h, w) or (B, 3, h, w).
        height: Height of the result [px].
        width: Width of the result [px].
        name: Named in errors.
        padding: Where the free part of the letterbox is.
        resize: How the picture is resized; "pillow" turns floats to bytes first.
        fill: Value of the free part, before it is mapped.

    Returns:
        (B, 3, height, width) float32 in [-1, 1], but for another `fill`; B = 1 for a single picture.

    Raises:
        UsageError: Another dtype or rank, other channels, a value that is NaN or outside [0, 1].
    """
    picture = _batched_image(image, name)
    frame = letterbox(picture, height, width, name=name, padding=padding, resize=resize, fill=fill)
    return frame * np.float32(2) - np.float32(1)


def letterbox(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    name: str = "image",
    padding: Padding = "left_top",
    resize: Resize = "bilinear",
    fill: float = 0.0,
) -> np.ndarray:
    """Fits a picture into a frame, keeping its proportions.

    Half-pixel centres; nothing is resized where the sizes agree.

    Args:
        image: (B, 3, h, w) uint8 (scaled to [0, 1]) or float32.
        height: Height of the frame [px].
        width: Width of the frame [px].
        name: Named in errors.
        padding: Where the free part is.
        resize: How the picture is resized.
        fill: Value of the free part.

    Returns:
        (B, 3, height, width) float32.
    """
    if resize == "pillow":
        image = _bytes(image)
    if image.shape[2:] == (height, width):
        return _unit_floats(image)
    new_height, new_width = letterbox_size(image.shape[2], image.shape[3], height, width, name=name)
    top, left = height - new_height, width - new_width
    if padding == "centre":
        top, left = top // 2, left // 2
    frame = np.full((*image.shape[:2], height, width), fill, np.float32)
    inside = frame[:, :, top : top + new_height, left : left + new_width]
    if resize == "pillow":
        # Columns before rows, each rounded to bytes, as Pillow does.
        inside[:] = _unit_floats(_resample(_resample(image, 3, new_width), 2, new_height))
    else:
        inside[:] = _interpolate(_interpolate(image, 2, new_height), 3, new_width)
    return frame


def letterbox_size(
    from_height: int, from_width: int, height: int, width: int, *, name: str = "image"
) -> tuple[int, int]:
    """Height and width [px] of the picture inside the frame, truncated as in training.

    Raises:
        UsageError: The picture is so narrow that nothing of it would be left.
    """
    ratio = max(from_width / width, from_height / height)
    size = int(from_height / ratio), int(from_width / ratio)
    if min(size) < 1:
        raise UsageError(
            f"{name} is too narrow to be letterboxed",
            expected=f"proportions that leave a pixel in a frame of {height}x{width}",
            got=f"{from_height}x{from_width}",
        )
    return size


def _interpolate(image: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation of one axis of (B, 3, h, w) to `size` points, in float32."""
    length = image.shape[axis]
    scale = np.float32(length / size)
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    centre = np.maximum(centre, np.float32(0))
    low = np.minimum(centre.astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    shape = [1, 1, 1, 1]
    shape[axis] = size
    weight = (centre - low.astype(np.float32)).reshape(shape)
    below = _unit_floats(np.take(image, low, axis))
    above = _unit_floats(np.take(image, high, axis))
    blend: np.ndarray = below * (np.float32(1) - weight) + above * weight
    return blend


def _resample(image: np.ndarray, axis: int, size: int) -> np.ndarray:
    """One axis of (B, 3, h, w) uint8 resampled to `size` points by a triangle as wide as a step; uint8."""
    length = image.shape[axis]
    if length == size:
        return image
    step = length / size
    reach = max(step, 1.0)
    centre = (np.arange(size) + 0.5) * step
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), length)
    points = np.arange(length)
    within = (points >= first[:, None]) & (points < last[:, None])
    weights = np.where(within, 1 - np.abs((points - centre[:, None] + 0.5) / reach), 0).clip(0)
    weights = weights / weights.sum(1, keepdims=True)
    fixed = np.floor(0.5 + weights * (1 << _PILLOW_BITS))
    # In float64 the products and sums of these integers are exact, and much faster than in integers.
    sums = np.moveaxis(np.moveaxis(image, axis, -1) @ fixed.T, -1, axis)
    rounded: np.ndarray = np.floor(sums / (1 << _PILLOW_BITS) + 0.5).clip(0, 255)
    return rounded.astype(np.uint8)


def _bytes(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] become uint8, truncated as openpi does it; bytes stay."""
    if image.dtype == np.uint8:
        return image
    scaled: np.ndarray = np.clip(image, 0, 1) * np.float32(255)
    return scaled.astype(np.uint8)


def _unit_floats(image: np.ndarray) -> np.ndarray:
    """Bytes become float32 in [0, 1]; floats stay."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    return image


def _batched_image(image: np.ndarray, name: str) -> np.ndarray:
    """The picture as (B, 3, h, w), uint8 or float32, checked."""
    image = np.asarray(image)
    batched = image[None] if image.ndim == 3 else image
    if image.dtype == np.uint8:
        channels, layout = -1, "uint8 (h, w, 3) or (B, h, w, 3)"
    elif image.dtype.kind == "f":
        channels, layout = 1, "float in [0, 1], (3, h, w) or (B, 3, h, w)"
    else:
        raise UsageError(
            f"{name} has a dtype that pictures do not have",
            expected="uint8 (h, w, 3), or float (3, h, w) in [0, 1]",
            got=image.dtype,
        )
    if batched.ndim != 4 or batched.shape[channels] != 3 or 0 in batched.shape:
        raise UsageError(f"{name} has a shape that is not a picture's", expected=layout, got=image.shape)
    if image.dtype == np.uint8:
        return np.moveaxis(batched, 3, 1)
    low, high = float(batched.min()), float(batched.max())
    if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):
        raise UsageError(
            f"{name} has values that are NaN or outside [0, 1]",
            expected="floats in [0, 1]",
            got=f"values from {low:g} to {high:g}",
            fix="divide by 255, or give uint8 (h, w, 3)",
        )
    return batched.astype(np.float32)
