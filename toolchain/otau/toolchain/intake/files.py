"""Reading parts of files that somebody else wrote: bytes, and tensors made of bytes in several places."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.training.policies.weights import StoredTensor

__all__ = ["FileRead", "Piece", "damaged", "open_file", "read_exactly", "read_into"]


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


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """The handle of a plain file.

    Raises:
        CheckpointError: It cannot be opened, or is a device, a pipe or a directory.
    """
    try:
        # A pipe that nobody writes to would otherwise block here.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(
            "a file of the checkpoint cannot be read",
            where=path,
            got=error.strerror,
            fix="check the file and its permissions, or copy the checkpoint again",
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            damaged(path, "it is no plain file")
        yield handle
    finally:
        os.close(handle)


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
