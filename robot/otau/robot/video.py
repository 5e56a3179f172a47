"""Writing what the robot's cameras see to an MP4."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from otau.robot.interrupts import interrupts_deferred
from otau.runtime.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["VideoWriter", "side_by_side"]

_CODECS = ("libx264", "mpeg4")
"""The first that this FFmpeg has is taken; the second is in every one."""


class VideoWriter:
    """An MP4 that appears under its name only when it is complete.

    Leaving the block completes it, after Ctrl-C too: the frames up to there are a video. After any
    other exception nothing is left.

    Example:
        with VideoWriter("run.mp4", rate=20) as video:
            video.write(observation.images)
    """

    def __init__(self, path: str | os.PathLike[str], rate: float) -> None:
        """Check the name and the package; nothing is written before the first frame.

        Args:
            path: A name that ends in `.mp4`, in a folder that exists; a file there is replaced.
            rate: Frames a second [Hz].

        Raises:
            UsageError: The name does not end in `.mp4`, or its folder cannot be written.
            MissingDependencyError: PyAV is not installed.
        """
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise UsageError("a video is an MP4", where=self.path, expected="a name that ends in .mp4")
        folder = self.path.absolute().parent
        if self.path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(
                "the video cannot be written there", where=self.path, expected="a file in a writable folder"
            )
        self._av = _import_av()
        self._rate = Fraction(rate).limit_denominator(1000)
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._container: Any = None
        self._stream: Any = None

    def write(self, images: Mapping[str, np.ndarray]) -> None:
        """Append one frame.

        Args:
            images: By camera, (h, w, 3) uint8; they are put side by side. All frames of a video have
                the same size.
        """
        picture = side_by_side(images)
        with interrupts_deferred():  # else it could leave a file without a stream
            if self._stream is None:
                self._open(*picture.shape[:2])
            self._mux(self._av.VideoFrame.from_ndarray(picture, format="rgb24"))

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the video, or discard it."""
        if self._container is None:
            return
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._mux(None)
                self._container.close()
                os.replace(self._part, self.path)
        finally:
            self._container.close()
            self._part.unlink(missing_ok=True)

    def _open(self, height: int, width: int) -> None:
        available = self._av.codecs_available
        codec = next(name for name in _CODECS if name in available)
        self._container = self._av.open(str(self._part), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=self._rate)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"

    def _mux(self, frame: Any) -> None:
        """Encode a frame, or with None what the encoder still holds."""
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def side_by_side(images: Mapping[str, np.ndarray]) -> np.ndarray:
    """Put the pictures of all cameras next to each other.

    Args:
        images: By camera, (h, w, 3) uint8, of any sizes.

    Returns:
        (H, W, 3) uint8, black where a picture is lower than the highest; H and W are even, as video
        with halved colour needs them.
    """
    height = max(image.shape[0] for image in images.values())
    width = sum(image.shape[1] for image in images.values())
    picture = np.zeros((height + height % 2, width + width % 2, 3), np.uint8)
    left = 0
    for image in images.values():
        picture[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1]
    return picture


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "a video needs PyAV", got=error, fix="pip install av, or make sim"
        ) from error
    return av
