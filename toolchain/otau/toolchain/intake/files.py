"""Reading parts of files that somebody else wrote: bytes, and tensors made of bytes in several places."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.training.policies.files import open_file
from otau.training.policies.weights import StoredTensor

__all__ = ["FileRead", "Piece", "check_numbers", "check_shape", "damaged", "read_exactly", "read_into"]

_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class Piece:
    """Bytes of a file that are a part of a tensor."""

    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class FileRead:
    """Reads a contiguous tensor: the `read` of a `StoredTensor` whose bytes lie in files as they are."""

    pieces: tuple[Piece, ...]
    """Exactly the tensor's bytes, in order; each of whole elements."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: A file is shorter than it was.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            view, at = memoryview(tensor.view(-1).view(torch.uint8).numpy()), 0
            for piece in self.pieces:
                with open_file(piece.path) as handle:
                    read_into(handle, piece.start, view[at : at + piece.nbytes], piece.path)
                at += piece.nbytes
        return tensor

    def read_through(self, buffer: memoryview) -> Iterator[memoryview]:
        """The tensor's bytes in order, a part at a time, each in the same memory.

        Args:
            buffer: A multiple of 8 bytes. Small enough, it stays in the processor's cache, which is twice as
                fast as fresh memory for a whole tensor.
        """
        for piece in self.pieces:
            with open_file(piece.path) as handle:
                for at in range(0, piece.nbytes, len(buffer)):
                    part = buffer[: min(len(buffer), piece.nbytes - at)]
                    read_into(handle, piece.start + at, part, piece.path)
                    yield part

    def stored(self) -> StoredTensor:
        """The tensor as every format gives it."""
        return StoredTensor(self.shape, self.dtype, self)


def check_shape(sizes: Any) -> tuple[int, ...]:
    """A shape from a file, if it is one.

    Raises:
        ValueError: It is not a list of numbers, or so large that it overflows.
    """
    shape = check_numbers(sizes)
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise ValueError("a shape beyond all bounds")
    return shape


def check_numbers(values: Any) -> tuple[int, ...]:
    """A shape, stride or offset from a file, if it is one.

    Raises:
        ValueError: It is not a list of numbers, or has too many or too large ones.
    """
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMS:
        raise ValueError("a shape, stride or offset that is no list of numbers")
    if not all(type(value) is int and 0 <= value <= _MAX_ELEMENTS for value in values):
        raise ValueError("a shape, stride or offset that is no number, or beyond all bounds")
    return tuple(values)


def read_into(handle: int, start: int, view: memoryview, where: Path) -> None:
    """Fills memory with a file's bytes.

    Raises:
        CheckpointError: The file is shorter.
    """
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], start + done)
        if not count:
            damaged(where, f"it ends {len(view) - done:,} bytes early")
        done += count


def read_exactly(handle: int, start: int, size: int, where: Path) -> bytes:
    """Bytes of a file, all of them.

    Raises:
        CheckpointError: The file is shorter.
    """
    if start < 0 or size < 0 or start + size > os.fstat(handle).st_size:
        damaged(where, f"{size:,} bytes at {start:,} of {os.fstat(handle).st_size:,}")
    data = bytearray(size)
    read_into(handle, start, memoryview(data), where)
    return bytes(data)


def damaged(where: object, got: str) -> NoReturn:
    """Raises the error for a file that is not whole."""
    raise CheckpointError(
        "the file is damaged, or not what torch.save writes",
        where=where,
        got=got,
        fix="copy the checkpoint again",
    )
