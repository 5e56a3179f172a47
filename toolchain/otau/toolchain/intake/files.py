"""Reading parts of files that somebody else wrote."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from otau.runtime.errors import CheckpointError

__all__ = ["damaged", "open_file", "read_exactly", "read_into"]


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
