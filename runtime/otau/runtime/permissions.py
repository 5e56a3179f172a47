"""Permissions of files and directories that were made under a private temporary name."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["make_as_readable_as_others"]


def make_as_readable_as_others(path: Path) -> None:
    """Gives a file or directory the permissions that an ordinary new one has here.

    `tempfile` and some writers, safetensors' among them, make it private.
    """
    # The umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
