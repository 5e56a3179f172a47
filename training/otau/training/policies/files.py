"""Files of a checkpoint folder: regular ones, inside of it, and of a size that is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from otau.runtime.errors import CheckpointError

__all__ = ["MAX_TEXT_BYTES", "inside", "open_file", "read_text", "require_inside"]

MAX_TEXT_BYTES = 16 << 20
"""A configuration of a whole training run takes 0.1 MB, the index of a full-size policy's shards 0.2 MB."""


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a checkpoint names: a plain file of the folder, or an error.

    Args:
        folder: The checkpoint.
        name: A name without a folder.
        where: The file that names it, for messages.

    Raises:
        CheckpointError: The name or a link leaves the folder, or there is no such file.
    """
    plain = PurePosixPath(name)
    if len(plain.parts) != 1 or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(
            "a file name in the checkpoint leaves its folder",
            where=folder / where,
            expected="the name of a file beside it",
            got=repr(name),
            fix="do not use this checkpoint",
        )
    # Unlike Path.is_file, no error where a name is too long or no text.
    if not os.path.isfile(folder / name):
        raise CheckpointError(
            "a file of the checkpoint is missing",
            where=folder / where,
            expected=name,
            got="no plain file" if os.path.lexists(folder / name) else "no such file",
            fix="copy the checkpoint again",
        )
    return require_inside(folder, folder / name)


def require_inside(folder: Path, path: Path) -> Path:
    """The path itself, if no link on it leads out of the folder.

    Raises:
        CheckpointError: One does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            "a file of the checkpoint is a link that leaves its folder",
            where=path,
            expected=f"a file in {folder}",
            got=path.resolve(),
            fix="replace the link by what it leads to: cp --recursive --dereference FOLDER COPY",
        )
    return path


def read_text(folder: Path, name: str) -> str:
    """The text of a small file of a checkpoint; of a larger one nothing is read.

    Args:
        folder: The checkpoint.
        name: A name without a folder.

    Raises:
        CheckpointError: It is no plain file inside of the folder, cannot be read, or is above
            `MAX_TEXT_BYTES`.
        UnicodeDecodeError: It is not UTF-8, for which callers have an error of their own.
    """
    path = inside(folder, name, name)
    with open_file(path) as handle, open(os.dup(handle), "rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1) if os.fstat(handle).st_size <= MAX_TEXT_BYTES else None
        if data is None or len(data) > MAX_TEXT_BYTES:
            raise CheckpointError(
                "a file of the checkpoint is too large",
                where=path,
                expected=f"at most {MAX_TEXT_BYTES:,} bytes",
                got=f"{os.fstat(handle).st_size:,}",
                fix="copy the checkpoint again",
            )
    return data.decode("utf-8")


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """The handle of a plain file.

    Raises:
        CheckpointError: It cannot be opened, or is a device, a pipe or a directory.
    """
    try:
        # A pipe that nobody writes to would otherwise block here.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "a file of the checkpoint cannot be read",
            where=path,
            got=error.strerror if isinstance(error, OSError) else error,
            fix="check the file and its permissions, or copy the checkpoint again",
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise CheckpointError(
                "a file of the checkpoint is no plain file",
                where=path,
                expected="a regular file",
                got="a directory, pipe or device",
                fix="copy the checkpoint again",
            )
        yield handle
    finally:
        os.close(handle)
