"""The files of a bundle: inside it, whole, and none that the manifest does not list."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from threading import Event

from otau.runtime.errors import BundleError
from otau.runtime.spec import FileSpec

__all__ = ["file_inside", "file_sha256", "read_inside", "refuse_unlisted", "verify_files"]

_CACHES = "engines/"
"""Where files may lie that the manifest does not list."""
_HASH_CHUNK = 256 * 1024
"""Bytes read at once. From the page cache (2 GB, Xeon with SHA extensions, best of five) pieces of 256 KiB
gave 1.24 GB/s, of 4 MiB 1.22 and of 64 KiB 1.06, of the 1.42 that SHA-256 alone does. A memory map gave 1.35,
but a file that shrinks while it is read would then end the process."""
_HASH_THREADS = 2
"""Files hashed at once. SHA-256 runs without the interpreter's lock: two threads hashed two files of 1 GB
at 2.4 GB/s, one at 1.2."""
_FIX = "copy the bundle again, or compile the checkpoint again"


def file_inside(root: Path, name: str) -> Path:
    """The path of a listed file, refused where it is not a plain file inside the bundle.

    Symbolic links are followed first: one that stays inside is fine, one that leaves is not.

    Raises:
        BundleError: The name is no plain relative path, or no regular file inside the bundle is there.
    """
    pure = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and str(pure) == name
    if not plain or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise BundleError(
            "the bundle lists a path that is not a plain relative one",
            where=root,
            got=repr(name),
            fix="do not use this bundle; compile the checkpoint again",
        )
    path = root / name
    try:
        real = path.resolve(strict=True)
        regular = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError("a file of the bundle is missing", where=path, got=error, fix=_FIX) from error
    if not real.is_relative_to(root.resolve()):
        raise BundleError(
            "a file of the bundle lies outside of it",
            where=path,
            got=real,
            fix="replace symbolic links by the files: cp -rL BUNDLE COPY",
        )
    if not regular:
        raise BundleError("an entry of the bundle is not a file", where=path, expected="a regular file")
    return path


def read_inside(root: Path, name: str, limit: int) -> bytes:
    """The bytes of a file of the bundle, of which there may be `limit` at most.

    Raises:
        BundleError: It is larger, cannot be read, or is no plain file inside the bundle.
    """
    where = file_inside(root, name)
    try:
        with where.open("rb") as file:
            data = file.read(limit + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BundleError(f"the bundle's {name} cannot be read", where=where, got=error) from error
    if len(data) > limit:
        raise BundleError(
            f"the bundle's {name} is too large",
            where=where,
            expected=f"at most {limit} bytes",
            got=f"{size} bytes",
        )
    return data


def verify_files(root: Path, files: Mapping[str, FileSpec]) -> None:
    """Refuses a file whose size or SHA-256 is not the listed one; all sizes are compared first.

    Raises:
        BundleError: Names the first such file, in the mapping's order.
    """
    paths = [_of_listed_size(root, name, spec) for name, spec in files.items()]
    stop = Event()
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        try:
            for _ in pool.map(lambda path, spec: _verify(path, spec, stop), paths, files.values()):
                pass
        except BaseException:
            # A damaged file, or Ctrl-C: nobody waits for the hash of gigabytes that no longer matters.
            stop.set()
            raise


def _of_listed_size(root: Path, name: str, spec: FileSpec) -> Path:
    path = file_inside(root, name)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BundleError("a file of the bundle cannot be read", where=path, got=error, fix=_FIX) from error
    if size != spec.bytes:
        raise BundleError(
            "a file of the bundle has another size than when it was written",
            where=path,
            expected=f"{spec.bytes} bytes",
            got=f"{size} bytes",
            fix=_FIX,
        )
    return path


def _verify(path: Path, spec: FileSpec, stop: Event) -> None:
    try:
        digest = _sha256(path, stop)
    except OSError as error:
        raise BundleError("a file of the bundle cannot be read", where=path, got=error, fix=_FIX) from error
    if digest != spec.sha256:
        raise BundleError(
            "a file of the bundle was changed after it was written",
            where=path,
            expected=f"SHA-256 {spec.sha256[:80]}",
            got=f"SHA-256 {digest}",
            fix=_FIX,
        )


def refuse_unlisted(root: Path, listed: Collection[str]) -> None:
    """Refuses entries that were not verified, but for those below `engines/`.

    Raises:
        BundleError: Names some of them.
    """
    # A link to a directory is fine where a listed file is reached by it.
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    known = {*listed, *parents}
    strangers = []
    for folder, directories, files in os.walk(root):
        base = Path(folder)
        linked = [name for name in directories if (base / name).is_symlink()]
        names = [(base / name).relative_to(root).as_posix() for name in files + linked]
        strangers += [name for name in names if name not in known]
    strangers = sorted(name for name in strangers if not name.startswith(_CACHES))
    if strangers:
        shown = ", ".join(map(repr, strangers[:5]))
        raise BundleError(
            "the bundle's directory has files that its manifest does not list",
            where=root,
            expected=f"the listed files, and anything below {_CACHES}",
            got=shown if len(strangers) <= 5 else f"{shown} and {len(strangers) - 5} more",
            fix="remove them, or compile the checkpoint again",
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    return _sha256(path, Event())


def _sha256(path: Path, stop: Event) -> str:
    """The same, as far as the file was read when `stop` was set."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not stop.is_set():
            digest.update(buffer[:count])
    return digest.hexdigest()
