"""SHA-256 of files, remembered for as long as nothing touches them.

A full-size bundle has 12.5 GB, its checkpoint 6.7 GB or more: hashing them takes longer than a recompilation
that has nothing to do may take. A file is taken for unchanged while its inode, size and both its times are:
any write, even one that restores the modification time, moves the change time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from otau.runtime.bundle_files import file_sha256

__all__ = ["RememberedHashes"]


class RememberedHashes:
    """Hashes of files by their inode."""

    def __init__(self, root: Path) -> None:
        """Remember in a folder, which is made when the first hash is kept."""
        self._root = root

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file in hex; read only if it is not known or was touched."""
        state = _state(path)
        with suppress(OSError, ValueError):
            note = self._note(path)
            known, digest = note.read_text(encoding="ascii").split("\n") if note.is_file() else ("", "")
            if known == state and len(digest) == 64:
                return digest
        digest = file_sha256(path)
        if _state(path) == state:
            self.remember(path, digest)
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """Note the hash of a file, because it was just written, linked or given other permissions."""
        note = self._note(path)
        # Losing a note costs time only, so a cache that cannot be written is no error.
        with suppress(OSError):
            self._root.mkdir(parents=True, exist_ok=True)
            draft = note.with_name(f"{note.name}.{os.getpid()}")
            draft.write_text(f"{_state(path)}\n{digest}", encoding="ascii")
            draft.replace(note)

    def _note(self, path: Path) -> Path:
        stat = path.stat()
        return self._root / f"{stat.st_dev}-{stat.st_ino}"


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
