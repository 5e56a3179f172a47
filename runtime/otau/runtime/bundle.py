"""Bundles: a directory that is verified whenever it is opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from otau.runtime.errors import BundleError, MismatchError, UsageError, nearest_name
from otau.runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    STATS_NAME,
    decode_manifest,
)
from otau.runtime.spec import FileSpec, Manifest, VectorSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Bundle", "file_sha256"]

_CHECKPOINT_FILES = ("train_config.json", "config.json", "hf_config.json", "model.safetensors", "latest")
_CACHES = "engines/"
"""Where files may lie that the manifest does not list."""
_HASH_CHUNK = 4 * 1024 * 1024


class Bundle:
    """An opened bundle, every file of which has been verified.

    Files in the directory that the manifest does not list are refused, for a graph could name one of
    them as its weights. Only below `engines/`, where caches may be built later, they may lie; they are
    never opened.

    Attributes:
        path: The bundle's directory.
        manifest: What is in the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `Bundle.open`, which verifies."""
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Reads the manifest and verifies the size and the SHA-256 of every file that it lists.

        Raises:
            UsageError: `path` is no bundle.
            MismatchError: The manifest's schema version is not this otau's.
            BundleError: The manifest or a listed file was changed, is missing, or lies outside, or the
                directory has a file that is not listed.
        """
        root = Path(path)
        if not (root / MANIFEST_NAME).is_file():
            raise _not_a_bundle(root)
        where = root / MANIFEST_NAME
        manifest = decode_manifest(_read_manifest(root), where)
        for name, spec in manifest.files.items():
            _verify(root, name, spec)
        _refuse_unlisted(root, manifest)
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            UsageError: The manifest does not list it.
        """
        if name not in self.manifest.files:
            raise UsageError(
                "the bundle has no such file",
                where=self.path,
                got=name,
                fix=nearest_name(name, self.manifest.files),
            )
        return _inside(self.path, name)

    def graph(self, name: str) -> Path:
        """The path of the ONNX model of `prefix`, `ingest` or `decoder`."""
        return self.file(self.manifest.graphs[name].file)

    def stats(self) -> dict[str, dict[str, np.ndarray]]:
        """The normalisation statistics, `stats()["state"]["mean"]` and so on.

        Returns:
            For `state` and `action`, the statistics by name, each (heads, width) float32.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        where = self.file(STATS_NAME)
        try:
            tensors = load_file(where)
        except (SafetensorError, OSError) as error:
            raise BundleError(
                "the normalisation statistics cannot be read", where=where, got=error
            ) from error
        grouped: dict[str, dict[str, np.ndarray]] = {"state": {}, "action": {}}
        for key, value in tensors.items():
            vector, _, name = key.partition(".")
            if vector not in grouped:
                raise BundleError(
                    "the statistics have an unknown key",
                    where=where,
                    got=key,
                    fix="compile the checkpoint again",
                )
            grouped[vector][name] = value
        return grouped

    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None where the bundle takes token ids."""
        name = self.manifest.prompt.tokenizer
        if name is None:
            return None
        from tokenizers import Tokenizer

        where = self.file(name)
        try:
            return Tokenizer.from_file(str(where))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError("the tokenizer cannot be read", where=where, got=error) from error

    def require(
        self,
        *,
        policy: str | None = None,
        cameras: Sequence[str] | None = None,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
    ) -> None:
        """Refuses a bundle that does not fit what will use it.

        Camera names must be the same set; their order is the bundle's business. State and action
        names must be the same sequence. Where the checkpoint does not tell the names, the manifest
        has generic ones (`state[0]`, `action[0]`, ...): those are compared by their number only.

        Args:
            policy: The policy type, for example "pi05".
            cameras: Names of the cameras that the robot delivers.
            state_names: Names of the state's dimensions as the robot has them.
            action_names: Names of the action's dimensions as the robot has them.

        Raises:
            MismatchError: Names what the bundle has, what was given, and the nearest name.
        """
        manifest = self.manifest
        if policy is not None and policy != manifest.policy:
            raise self._mismatch("policy type", [manifest.policy], [policy])
        names = [camera.name for camera in manifest.cameras]
        if cameras is not None and sorted(cameras) != sorted(names):
            raise self._mismatch("cameras", names, cameras)
        if state_names is not None:
            self._require_names("state", manifest.state, state_names)
        if action_names is not None:
            self._require_names("action", manifest.action, action_names)

    def _require_names(self, kind: str, vector: VectorSpec, given: Sequence[str]) -> None:
        generic = vector.names == tuple(f"{kind}[{index}]" for index in range(vector.dim))
        if len(given) != vector.dim or not (generic or tuple(given) == vector.names):
            raise self._mismatch(f"{kind} names", vector.names, given)

    def _mismatch(self, what: str, expected: Sequence[str], got: Sequence[str]) -> MismatchError:
        strangers = [name for name in got if name not in expected]
        return MismatchError(
            f"the bundle's {what} are not those of the robot or call",
            where=self.path,
            expected=f"{len(expected)}: {', '.join(expected)}",
            got=f"{len(got)}: {', '.join(got)}",
            fix=nearest_name(strangers[0], expected) if strangers else "give the names in the bundle's order",
        )


def _not_a_bundle(root: Path) -> UsageError:
    """Why `root` is not a bundle, and what to do."""
    if not root.exists():
        return UsageError("there is no such bundle", where=root, fix="check the path")
    if root.is_dir() and any((root / name).exists() for name in _CHECKPOINT_FILES):
        return UsageError(
            "this is a checkpoint, not a bundle",
            where=root,
            fix=f"compile it first: otau compile {root} --target cpu -o BUNDLE",
        )
    return UsageError(
        "this is not a bundle",
        where=root,
        expected=f"a directory with a {MANIFEST_NAME}",
        fix="make one with: otau compile CHECKPOINT --target cpu -o BUNDLE",
    )


def _read_manifest(root: Path) -> bytes:
    """The manifest's bytes, never more than the bound."""
    where = _inside(root, MANIFEST_NAME)
    try:
        with where.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleError("the bundle's manifest cannot be read", where=where, got=error) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            "the bundle's manifest is too large",
            where=where,
            expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            got=f"{where.stat().st_size} bytes",
        )
    return data


def _inside(root: Path, name: str) -> Path:
    """The path of a listed file, refused where it is not a plain file inside the bundle.

    Symbolic links are followed first: one that stays inside is fine, one that leaves is not.
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
        raise BundleError(
            "a file of the bundle is missing",
            where=path,
            got=error,
            fix="copy the bundle again, or compile the checkpoint again",
        ) from error
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


def _verify(root: Path, name: str, spec: FileSpec) -> None:
    """Refuses a file whose size or hash is not the manifest's; reads no more than the listed size."""
    path = _inside(root, name)
    fix = "copy the bundle again, or compile the checkpoint again"
    try:
        size = path.stat().st_size
        digest = file_sha256(path) if size == spec.bytes else ""
    except OSError as error:
        raise BundleError("a file of the bundle cannot be read", where=path, got=error, fix=fix) from error
    if size != spec.bytes:
        raise BundleError(
            "a file of the bundle has another size than when it was written",
            where=path,
            expected=f"{spec.bytes} bytes",
            got=f"{size} bytes",
            fix=fix,
        )
    if digest != spec.sha256:
        raise BundleError(
            "a file of the bundle was changed after it was written",
            where=path,
            expected=f"SHA-256 {spec.sha256[:80]}",
            got=f"SHA-256 {digest}",
            fix=fix,
        )


def _refuse_unlisted(root: Path, manifest: Manifest) -> None:
    """Refuses entries that were not verified."""
    listed = {MANIFEST_NAME, *manifest.files}
    # A link to a directory is fine where a listed file is reached by it.
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    strangers = []
    for folder, directories, files in os.walk(root):
        base = Path(folder)
        linked = [name for name in directories if (base / name).is_symlink()]
        names = [(base / name).relative_to(root).as_posix() for name in files + linked]
        strangers += [name for name in names if name not in listed | parents]
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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
