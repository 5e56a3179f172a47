"""The compile cache: the results of stages, each in a folder named by what it was made from.

    <root>/stages/<stage>-<key>/    the files that the stage left, and entry.json
    <root>/hashes/                  hashes of files that were not touched since
    <root>/sources/                 which of a checkpoint folder's files count, and their hash

A stage works in a temporary folder that is renamed when it has passed, so an interrupted compilation leaves
whole entries or none, and the next one goes on behind the last of them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import msgspec

from otau.runtime.errors import UsageError
from otau.runtime.spec import FileSpec
from otau.toolchain.cache.hashes import RememberedHashes

__all__ = ["CACHE_VARIABLE", "CompileCache", "Entry", "default_root"]

CACHE_VARIABLE = "OTAU_CACHE"
"""Environment variable with the cache's folder."""

_LOG = logging.getLogger(__name__)
_ENTRY = "entry.json"
_ABANDONED_AFTER_S = 24 * 3600
_MAX_ENTRY_BYTES = 1 << 20


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`entry.json`: what a stage left, and what it cost."""

    stage: str
    key: str
    created: Annotated[float, msgspec.Meta(ge=0, le=4e9)]
    """Seconds since the epoch."""
    seconds: float
    peak_rss_mb: float
    """Largest resident memory of the process during the stage [MiB]."""
    files: dict[str, FileSpec]

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.bytes for file in self.files.values())


def default_root() -> Path:
    """`$OTAU_CACHE`, else the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otau"


class CompileCache:
    """Results of stages by their key."""

    def __init__(self, root: Path) -> None:
        """Use a folder, which is made when it is first written to."""
        self.root = root
        self.hashes = RememberedHashes(root / "hashes")
        self._stages = root / "stages"

    def folder(self, stage: str, key: str) -> Path:
        """Where the results of a stage are, or will be."""
        return self._stages / f"{stage}-{key[:32]}"

    def find(self, stage: str, key: str) -> Entry | None:
        """The entry of a stage, or None where there is none; a damaged one is removed."""
        folder = self.folder(stage, key)
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink(missing_ok=True)
            return None
        damage = self._damage(folder, key)
        if damage:
            _LOG.warning("the cached result of %s is damaged and will be made again: %s", stage, damage)
            shutil.rmtree(folder)
            return None
        return _read_entry(folder)

    @contextmanager
    def writing(self, stage: str, key: str) -> Iterator[tuple[Path, Callable[[float, float], Entry]]]:
        """A temporary folder for a stage's results, and what makes it the entry.

        Leaving the block without having called that removes the folder.
        """
        try:
            self._stages.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{stage}.", dir=self._stages))
        except OSError as error:
            raise UsageError(
                "the compile cache cannot be written",
                where=self.root,
                got=error,
                fix=f"name another folder with --cache or {CACHE_VARIABLE}",
            ) from None

        def keep(seconds: float, peak_rss_mb: float) -> Entry:
            return self._keep(draft, stage, key, seconds, peak_rss_mb)

        try:
            yield draft, keep
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def entries(self) -> list[tuple[Path, Entry | None]]:
        """Every entry's folder, oldest first, and its record, None where that cannot be read."""
        folders = [path for path in self._stages.glob("[!.]*") if path.is_dir()]
        found = [(folder, _read_entry(folder)) for folder in folders]
        return sorted(found, key=lambda pair: pair[1].created if pair[1] else 0.0)

    def remove(self, folder: Path) -> None:
        """Remove an entry; a bundle that was made from it keeps its files."""
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)

    def drafts(self) -> list[Path]:
        """What killed compilations left behind, or running ones work in."""
        return sorted(self._stages.glob(".*"))

    def sweep(self) -> None:
        """Remove drafts that nobody can be working in any more."""
        for draft in self.drafts():
            with suppress(OSError):
                if time.time() - draft.stat().st_mtime > _ABANDONED_AFTER_S:
                    shutil.rmtree(draft)

    def forget(self) -> None:
        """Drop all notes on hashes, checkpoints and bundles; they cost no more than time to make again."""
        for notes in ("hashes", "sources", "bundles"):
            shutil.rmtree(self.root / notes, ignore_errors=True)

    @contextmanager
    def in_use(self, *, alone: bool = False) -> Iterator[None]:
        """Hold the cache while it is used; alone, while entries are removed.

        Raises:
            UsageError: Somebody uses it and `alone` was asked for.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("w")
        except OSError as error:
            raise UsageError(
                "the compile cache cannot be written",
                where=self.root,
                got=error,
                fix=f"name another folder with --cache or {CACHE_VARIABLE}",
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
            except BlockingIOError:
                raise UsageError(
                    "a compilation is using the cache", where=self.root, fix="wait until it has ended"
                ) from None
            yield

    def _keep(self, draft: Path, stage: str, key: str, seconds: float, peak_rss_mb: float) -> Entry:
        files = {}
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                digest = self.hashes.sha256(path)
                files[path.relative_to(draft).as_posix()] = FileSpec(bytes=path.stat().st_size, sha256=digest)
        entry = Entry(
            stage=stage, key=key, created=time.time(), seconds=seconds, peak_rss_mb=peak_rss_mb, files=files
        )
        (draft / _ENTRY).write_bytes(msgspec.json.encode(entry))
        draft.chmod(0o755)
        folder = self.folder(stage, key)
        try:
            draft.rename(folder)
        except OSError as error:
            # Somebody else made the same result in the meantime.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        return entry

    def _damage(self, folder: Path, key: str) -> str | None:
        """What is wrong with an entry, if anything."""
        entry = _read_entry(folder)
        if entry is None or entry.key != key:
            return f"{_ENTRY} cannot be read"
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {_ENTRY}
        if present != set(entry.files):
            return f"its files are not those that {_ENTRY} lists"
        for name, spec in entry.files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != spec.bytes:
                return f"{name} is missing or has another size"
            if self.hashes.sha256(path) != spec.sha256:
                return f"{name} was changed"
        return None


def _read_entry(folder: Path) -> Entry | None:
    path = folder / _ENTRY
    try:
        # A pipe in its place would never end.
        if not path.is_file() or path.stat().st_size > _MAX_ENTRY_BYTES:
            return None
        return msgspec.json.decode(path.read_bytes(), type=Entry)
    except (OSError, msgspec.MsgspecError):
        return None
