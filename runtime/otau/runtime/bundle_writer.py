"""Writing a bundle: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from otau.runtime.bundle_files import file_sha256
from otau.runtime.errors import UsageError
from otau.runtime.manifest import MANIFEST_NAME, decode_manifest, encode_manifest, manifest_fingerprint
from otau.runtime.permissions import make_as_readable_as_others
from otau.runtime.spec import FileSpec, Manifest

__all__ = ["BundleWriter"]


class BundleWriter:
    """Writes a bundle whole or not at all.

    Entering makes a temporary directory `path` beside the destination (same file system, name
    starting with a dot); the caller fills it, then calls `seal`, which hashes every file in it, writes
    `manifest.json` and flushes everything to disk. Leaving the block then renames the directory to the
    destination; a bundle that was there before is first renamed aside, put back should that rename
    fail, and deleted only afterwards. Leaving by an exception, or without `seal`, deletes the
    temporary directory and leaves the destination as it was.

    Example:
        with BundleWriter(out) as writer:
            (writer.path / "prefix.onnx").write_bytes(model)
            manifest = writer.seal(manifest)
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        """Nothing is written before the block is entered.

        Raises:
            UsageError: The destination exists and is neither a bundle nor an empty directory, or its
                parent is not a directory that can be made.
        """
        self.destination = Path(os.path.abspath(destination))
        self._path: Path | None = None
        self._sealed = False
        self._check_destination()

    @property
    def path(self) -> Path:
        """The temporary directory to write the bundle's files in."""
        if self._path is None:
            raise RuntimeError("a BundleWriter is used in a with block")
        return self._path

    def __enter__(self) -> BundleWriter:
        """Makes the temporary directory."""
        parent = self.destination.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._path = Path(tempfile.mkdtemp(prefix=f".{self.destination.name}.", dir=parent))
            make_as_readable_as_others(self._path)
        except OSError as error:
            raise UsageError(
                "the bundle cannot be written there",
                where=self.destination,
                got=error,
                fix="choose a directory that you may write to",
            ) from error
        return self

    def seal(self, manifest: Manifest, sha256: Callable[[Path], str] = file_sha256) -> Manifest:
        """Lists and hashes every file written so far, and writes the manifest.

        Args:
            manifest: Complete but for `files` and `fingerprint`, which are replaced.
            sha256: Hashes a file; for who knows the hashes already.

        Returns:
            The manifest as written.
        """
        files = {}
        for file in sorted(self.path.rglob("*")):
            if file.is_file() and file != self.path / MANIFEST_NAME:
                name = file.relative_to(self.path).as_posix()
                files[name] = FileSpec(bytes=file.stat().st_size, sha256=sha256(file))
                make_as_readable_as_others(file)
                _flush(file)
        manifest = msgspec.structs.replace(manifest, files=files, fingerprint="")
        manifest = msgspec.structs.replace(manifest, fingerprint=manifest_fingerprint(manifest))
        where = self.path / MANIFEST_NAME
        data = encode_manifest(manifest)
        decode_manifest(data, where)
        where.write_bytes(data)
        _flush(where)
        _flush(self.path)
        self._sealed = True
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the sealed bundle in its place, or removes what was written."""
        try:
            if error is None:
                if not self._sealed:
                    raise RuntimeError("a BundleWriter's block must call seal()")
                self._move_into_place()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)

    def _move_into_place(self) -> None:
        self._check_destination()
        if not self.destination.exists():
            self.path.rename(self.destination)
        else:
            aside = self.path.with_name(self.path.name + ".old")
            self.destination.rename(aside)
            try:
                self.path.rename(self.destination)
            except BaseException:
                aside.rename(self.destination)
                raise
            shutil.rmtree(aside)
        _flush(self.destination.parent)

    def _check_destination(self) -> None:
        """Only a bundle or an empty directory may be replaced."""
        out = self.destination
        if not out.exists() and not out.is_symlink():
            return
        if (
            out.is_dir()
            and not out.is_symlink()
            and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))
        ):
            return
        raise UsageError(
            "the destination exists and is not a bundle",
            where=out,
            expected="a new path, an empty directory, or a bundle to replace",
            fix="choose another path, or remove it yourself",
        )


def _flush(path: Path) -> None:
    """Forces a file or a directory's entries to disk, so that a power cut leaves no half bundle."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
