"""Signatures of bundles: who vouches for one.

`signature.json` lies beside `manifest.json` and is not listed in it, so signing changes neither the manifest
nor the fingerprint, can be done long after compiling, and by several. Signed, with Ed25519, are the bytes
`otau bundle signature v1`, a zero byte, and the SHA-256 of `manifest.json`. The first part keeps a signature
from being taken for one of anything else that the key may sign. The manifest holds size and SHA-256 of every
other file, and opening a bundle compares them and refuses files that are not listed, also where a graph
names one as its weights; so the signature covers the whole bundle but for what lies below `engines/`, which
is built later and not opened.

A signature says that a key's holder vouches for exactly this bundle. It does not say that the bundle is the
newest one, and the key in the file proves nothing by itself: whoever opens the bundle must know the key.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from otau.runtime.ed25519 import SigningKey, is_weak_key, read_public_key, signature_fits
from otau.runtime.errors import BundleError, MismatchError, UsageError
from otau.runtime.permissions import make_as_readable_as_others

__all__ = [
    "KeyPaths",
    "MAX_SIGNATURES",
    "MAX_SIGNATURE_BYTES",
    "POLICY_VARIABLE",
    "SIGNATURE_NAME",
    "Requirement",
    "Signature",
    "decode_signatures",
    "encode_signatures",
    "key_id",
    "read_requirements",
    "refuse_unsigned",
    "sign_manifest",
    "signed_message",
    "verifies",
    "write_signatures",
]

SIGNATURE_NAME = "signature.json"
MAX_SIGNATURES = 16
MAX_SIGNATURE_BYTES = 16 * 1024
"""Largest `signature.json` that is read: several times what the largest number of signatures needs."""
POLICY_VARIABLE = "OTAU_REQUIRE_SIGNATURE"
KeyPaths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A path of a PEM file with a public key, or several."""
_VERSION: Literal[1] = 1
_DOMAIN = b"otau bundle signature v1\0"


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One signature; in the file, bytes are base64."""

    algorithm: Literal["ed25519"]
    key_id: str
    """The first 16 hex digits of the public key's SHA-256, to tell keys apart by eye."""
    public_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class _Probe(msgspec.Struct):
    """The one key that must be read before the layout of the others is known."""

    version: int


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    signatures: Annotated[tuple[Signature, ...], msgspec.Meta(min_length=1, max_length=MAX_SIGNATURES)]


def signed_message(manifest: bytes) -> bytes:
    """What is signed of a bundle whose `manifest.json` has these bytes."""
    return _DOMAIN + hashlib.sha256(manifest).digest()


def key_id(public_key: bytes) -> str:
    """The name of a raw public key."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def encode_signatures(signatures: Sequence[Signature]) -> bytes:
    """The canonical bytes of `signature.json`."""
    record = _File(version=_VERSION, signatures=tuple(signatures))
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode_signatures(data: bytes, where: object) -> tuple[Signature, ...]:
    """Decodes `signature.json` and refuses anything but the canonical bytes of a sound one.

    Whether the signatures are right is not looked at; `verifies` does.

    Args:
        data: What the file holds, `MAX_SIGNATURE_BYTES` at most.
        where: Named in errors, usually the file's path.

    Raises:
        MismatchError: The file has another version.
        BundleError: Anything else is wrong with it.
    """
    fix = f"remove {where}, or copy the bundle again from where it came"
    try:
        version = msgspec.json.decode(data, type=_Probe).version
        if version != _VERSION:
            raise MismatchError(
                "the bundle's signatures have a version that this otau does not read",
                where=where,
                expected=f"version {_VERSION}",
                got=f"version {version}",
                fix="install the otau that signed the bundle, or sign it again with this one",
            )
        signatures = msgspec.json.decode(data, type=_File).signatures
    # ValueError: invalid UTF-8. RecursionError: nesting deeper than the interpreter's stack.
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BundleError(
            "the bundle's signatures cannot be read", where=where, got=error, fix=fix
        ) from error
    for problem in _problems(signatures, data):
        raise BundleError(f"the bundle's signatures are malformed: {problem}", where=where, fix=fix)
    return signatures


def _problems(signatures: Sequence[Signature], data: bytes) -> list[str]:
    """What is wrong with signatures that were decoded from `data`, in words."""
    found = []
    for entry in signatures:
        if entry.key_id != key_id(entry.public_key):
            found.append(f"key_id {entry.key_id[:32]!r} is not its key's, {key_id(entry.public_key)}")
        if is_weak_key(entry.public_key):
            found.append(f"anybody can sign for the key {key_id(entry.public_key)}")
    if len({entry.public_key for entry in signatures}) != len(signatures):
        found.append("a key has signed twice")
    # Also refuses what a decoder forgives: keys given twice, base64 with stray bits.
    if encode_signatures(signatures) != data:
        found.append("it is not written in otau's own formatting")
    return found


def sign_manifest(manifest: bytes, key: SigningKey) -> Signature:
    """Signs a bundle whose `manifest.json` has these bytes."""
    return Signature(
        algorithm="ed25519",
        key_id=key_id(key.public_key),
        public_key=key.public_key,
        signature=key.sign(signed_message(manifest)),
    )


def verifies(entry: Signature, manifest: bytes) -> bool:
    """Whether a signature is its key's, over a bundle whose `manifest.json` has these bytes.

    Raises:
        MissingDependencyError: The extra `sign` is not installed.
    """
    return signature_fits(entry.public_key, entry.signature, signed_message(manifest))


@dataclass(frozen=True)
class Requirement:
    """Keys, one of which must have signed a bundle."""

    keys: tuple[bytes, ...]
    """Raw public keys."""
    source: str
    """Who asks for it, named in errors."""


def read_requirements(given: KeyPaths | None) -> tuple[Requirement, ...]:
    """What must be signed here: by the caller's wish, and by the machine's policy, which it cannot lift.

    The policy is the environment variable OTAU_REQUIRE_SIGNATURE: absolute paths of public keys, separated
    by colons.

    Args:
        given: Paths of public keys, of which one must have signed; None asks for none.

    Raises:
        UsageError: A key cannot be read, or no key is named: a policy that got lost must not go unnoticed.
        MissingDependencyError: The extra `sign` is not installed.
    """
    found = []
    if given is not None:
        paths = [Path(given)] if isinstance(given, str | os.PathLike) else [Path(path) for path in given]
        if not paths:
            raise UsageError("a signature is required, but no key is given", where="require_signature")
        found.append(Requirement(tuple(map(read_public_key, paths)), "this call"))
    policy = os.environ.get(POLICY_VARIABLE)
    if policy is not None:
        paths = [Path(path) for path in policy.split(os.pathsep)]
        if not all(path.is_absolute() for path in paths):
            raise UsageError(
                "the machine's policy on signatures is not a list of absolute paths",
                where=f"environment variable {POLICY_VARIABLE}",
                expected=f"public keys, separated by {os.pathsep!r}",
                got=repr(policy),
                fix=f"correct it, or unset {POLICY_VARIABLE} where no signature is required",
            )
        found.append(Requirement(tuple(map(read_public_key, paths)), POLICY_VARIABLE))
    return tuple(found)


def refuse_unsigned(
    manifest: bytes, signatures: Sequence[Signature], requirement: Requirement, where: Path
) -> None:
    """Refuses a bundle that none of the required keys has signed.

    An unsigned bundle lacks a file, and one whose signature is wrong was changed: both are damaged, as far
    as anybody can tell. One that is signed by somebody else may be whole; it does not fit this machine.

    Args:
        manifest: The bytes of `manifest.json`.
        signatures: Those of `signature.json`.
        requirement: The keys.
        where: The bundle.

    Raises:
        BundleError: The bundle is not signed, or the signature of a required key is not one of this bundle.
        MismatchError: Only other keys have signed.
        MissingDependencyError: The extra `sign` is not installed.
    """
    expected = f"{' or '.join(map(key_id, requirement.keys))}, which {requirement.source} requires"
    if not signatures:
        raise BundleError(
            "the bundle is not signed",
            where=where,
            expected=expected,
            got=f"no {SIGNATURE_NAME}",
            fix="get the signed bundle, or sign it where the private key is: otau sign BUNDLE --key KEY.pem",
        )
    entries = [entry for entry in signatures if entry.public_key in requirement.keys]
    if not entries:
        raise MismatchError(
            "the bundle is signed, but not by a key that is required here",
            where=where,
            expected=expected,
            got=", ".join(entry.key_id for entry in signatures),
            fix="get the bundle from whom you trust, or require the key of who signed it, if you trust them",
        )
    if not any(verifies(entry, manifest) for entry in entries):
        raise BundleError(
            "the bundle's signature does not fit: manifest or signature were changed, or are of two bundles",
            where=where / SIGNATURE_NAME,
            expected=expected,
            got=f"{', '.join(entry.key_id for entry in entries)}, not valid",
            fix="do not use this bundle; copy it again from where it came",
        )


def write_signatures(root: Path, signatures: Sequence[Signature]) -> None:
    """Puts `signature.json` into a bundle, whole or not at all, in place of one that is there.

    The temporary file lies beside the bundle: inside, it would be a file that the manifest does not list.

    Raises:
        OSError: It cannot be written there.
    """
    real = root.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{real.name}.{SIGNATURE_NAME}.", dir=real.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(encode_signatures(signatures))
            make_as_readable_as_others(temporary)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(real / SIGNATURE_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(real, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
