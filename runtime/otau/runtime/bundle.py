"""Bundles: a directory that is verified whenever it is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otau.runtime.bundle_files import file_inside, read_inside, refuse_unlisted, verify_files
from otau.runtime.errors import BundleError, MismatchError, UsageError, nearest_name
from otau.runtime.external_data import refuse_unlisted_weights
from otau.runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    STATS_NAME,
    decode_manifest,
    encode_manifest,
)
from otau.runtime.signature import (
    MAX_SIGNATURE_BYTES,
    MAX_SIGNATURES,
    SIGNATURE_NAME,
    KeyPaths,
    Requirement,
    Signature,
    decode_signatures,
    read_requirements,
    refuse_unsigned,
    sign_manifest,
    write_signatures,
)
from otau.runtime.spec import Manifest, VectorSpec

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from otau.runtime.ed25519 import SigningKey

__all__ = ["Bundle"]

_CHECKPOINT_FILES = ("train_config.json", "config.json", "hf_config.json", "model.safetensors", "latest")


class Bundle:
    """An opened bundle, every file of which has been verified.

    Files in the directory that the manifest does not list are refused. Only below `engines/`, where caches
    may be built later, they may lie; they are never opened, and a graph that names one of them, or a file
    outside of the bundle, as its weights is refused. `signature.json` is not listed either: see
    `otau.runtime.signature`.

    Attributes:
        path: The bundle's directory.
        manifest: What is in the bundle.
        signatures: What `signature.json` says. None of it is checked but what opening required.
    """

    def __init__(self, path: Path, manifest: Manifest, signatures: Sequence[Signature] = ()) -> None:
        """Use `Bundle.open`, which verifies."""
        self.path = path
        self.manifest = manifest
        self.signatures = tuple(signatures)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, require_signature: KeyPaths | None = None) -> Bundle:
        """Reads the manifest and verifies the size and the SHA-256 of every file that it lists.

        Where a signature is required, it is verified before anything else of the bundle is looked at. The
        environment variable OTAU_REQUIRE_SIGNATURE, absolute paths of public keys separated by colons,
        requires one whenever a bundle is opened, whatever the caller asks for.

        Args:
            path: The bundle's directory.
            require_signature: A public key (PEM), or several of which one must have signed the bundle.

        Raises:
            UsageError: `path` is no bundle, or a key cannot be read.
            MismatchError: The manifest's schema version is not this otau's, or the bundle is signed, but
                not by a required key.
            MissingDependencyError: A signature is required, and the extra `sign` is not installed.
            BundleError: The manifest or a listed file was changed, is missing, or lies outside; the
                directory has a file that is not listed; a graph names one as its weights; or a required
                signature is missing or does not fit.
        """
        return cls._verified(Path(path), read_requirements(require_signature))

    @classmethod
    def open_to_sign(cls, path: str | os.PathLike[str]) -> Bundle:
        """Opens and verifies a bundle that need not be signed yet, whatever the machine's policy.

        Raises:
            UsageError, MismatchError, BundleError: As `open`, without what concerns required signatures.
        """
        return cls._verified(Path(path), ())

    @classmethod
    def _verified(cls, root: Path, requirements: Sequence[Requirement]) -> Bundle:
        where = root / MANIFEST_NAME
        if not where.is_file():
            raise _not_a_bundle(root)
        data = read_inside(root, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        signatures = _read_signatures(root)
        for requirement in requirements:
            refuse_unsigned(data, signatures, requirement, root)
        manifest = decode_manifest(data, where)
        if SIGNATURE_NAME in manifest.files:
            raise BundleError(f"the bundle's manifest lists {SIGNATURE_NAME}, which signs it", where=where)
        verify_files(root, manifest.files)
        refuse_unlisted(root, {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files})
        for graph in manifest.graphs.values():
            refuse_unlisted_weights(root, graph.file, manifest.files)
        return cls(root, manifest, signatures)

    def sign(self, key: SigningKey) -> Bundle:
        """Signs the bundle as it was when it was opened; a signature of the same key is replaced.

        Returns:
            The signed bundle.

        Raises:
            UsageError: There are too many signatures, or the file cannot be written.
        """
        entry = sign_manifest(encode_manifest(self.manifest), key)
        others = [other for other in self.signatures if other.public_key != entry.public_key]
        signatures = (*others, entry)
        if len(signatures) > MAX_SIGNATURES:
            raise UsageError(
                "the bundle has as many signatures as it may have",
                where=self.path / SIGNATURE_NAME,
                got=", ".join(other.key_id for other in others),
                fix="remove the file, and sign again with the keys that count",
            )
        try:
            write_signatures(self.path, signatures)
        except OSError as error:
            raise UsageError(
                "the signature cannot be written beside and into the bundle",
                where=self.path,
                got=error,
                fix="sign a copy in a directory that you may write to",
            ) from error
        return Bundle(self.path, self.manifest, signatures)

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
        return file_inside(self.path, name)

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
        # KeyError, AttributeError: a dtype that numpy does not have. ValueError, OverflowError: a shape.
        except (SafetensorError, OSError, KeyError, AttributeError, ValueError, OverflowError) as error:
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
        from otau.runtime.tokenizer_file import MAX_TOKENIZER_BYTES, load_tokenizer

        data = read_inside(self.path, name, MAX_TOKENIZER_BYTES)
        try:
            return load_tokenizer(data)
        except ValueError as error:
            raise BundleError("the tokenizer cannot be read", where=self.file(name), got=error) from error

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


def _read_signatures(root: Path) -> tuple[Signature, ...]:
    """What `signature.json` says; nothing where there is none."""
    where = root / SIGNATURE_NAME
    if not os.path.lexists(where):
        return ()
    return decode_signatures(read_inside(root, SIGNATURE_NAME, MAX_SIGNATURE_BYTES), where)
