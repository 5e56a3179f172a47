"""The hash of a checkpoint folder: of the files that a compilation reads.

Which these are is for the intake to say, and asking it takes seconds. The answer is remembered for as long as
no file of the folder is added, removed or touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from otau.runtime.errors import UsageError
from otau.runtime.manifest import MANIFEST_NAME
from otau.toolchain.cache.store import CompileCache

__all__ = ["digest", "folder_digest"]

_MOST_FILES = 20_000
_SMALL_BYTES = 16 << 20


def digest(document: object) -> str:
    """SHA-256 of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def folder_digest(cache: CompileCache, folder: Path, named: Callable[[], Iterable[Path]]) -> str:
    """The hash of a checkpoint folder.

    Args:
        cache: Remembers hashes.
        folder: The checkpoint.
        named: The files that count whatever their size, those of the weights; asked only if the folder was
            touched. Of the others the small ones count, which hold configuration and statistics.

    Raises:
        UsageError: There is no such folder, or it cannot be a checkpoint.
        OtauError: Whatever `named` raises.
    """
    if not folder.is_dir():
        raise UsageError("there is no such checkpoint folder", where=folder, fix="check the path")
    files = sorted(_files(folder))
    state = digest([str(folder.resolve()), [(str(path), *_state(path)) for path in files]])
    note = cache.root / "sources" / state[:32]
    with suppress(OSError):
        known = note.read_text(encoding="ascii") if note.is_file() else ""
        if len(known) == 64:
            return known
    read = {path.resolve() for path in named()}
    read |= {path.resolve() for path in files if path.stat().st_size <= _SMALL_BYTES}
    root = folder.resolve()
    result = digest(sorted((os.path.relpath(path, root), cache.hashes.sha256(path)) for path in read))
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{note.name}.{os.getpid()}")
        draft.write_text(result, encoding="ascii")
        draft.replace(note)
    return result


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    for parent, folders, names in os.walk(folder):
        # A bundle that was written into the checkpoint's folder is no part of it.
        folders[:] = sorted(name for name in folders if not Path(parent, name, MANIFEST_NAME).is_file())
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                count += 1
                if count > _MOST_FILES:
                    raise UsageError(
                        "this folder has too many files to be a checkpoint",
                        where=folder,
                        expected=f"at most {_MOST_FILES} files",
                        fix="name the checkpoint folder itself, for example run/checkpoints/000040",
                    )
                yield path


def _state(path: Path) -> tuple[int, int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
