"""Ed25519 keys in PEM files; signing and verifying. Nothing else needs the package `cryptography`."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from otau.runtime.dependencies import require
from otau.runtime.errors import UsageError

__all__ = [
    "SigningKey",
    "is_weak_key",
    "make_key_pair",
    "read_public_key",
    "read_signing_key",
    "signature_fits",
]

_log = logging.getLogger(__name__)

_MAX_PEM_BYTES = 16 * 1024
_MAKE = "make one with: openssl genpkey -algorithm ed25519 -out PRIVATE.pem"
_EXTRACT = "extract the public key: openssl pkey -in PRIVATE.pem -pubout -out KEY.pub"
_PRIME = 2**255 - 19
_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_WEAK = {0, 1, _PRIME - 1, _ORDER_8, _PRIME - _ORDER_8}
"""The y of the eight points whose order divides 8, on RFC 8032's curve."""


class SigningKey:
    """A private key.

    Attributes:
        public_key: The raw public key, 32 bytes.
    """

    def __init__(self, private: Any) -> None:
        """Use `read_signing_key` or `make_key_pair`."""
        self.public_key: bytes = private.public_key().public_bytes_raw()
        self._private = private

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, 64 bytes; the same each time."""
        signature: bytes = self._private.sign(message)
        return signature


def signature_fits(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the holder of a key signed this message; never true for a weak key.

    Args:
        public_key: Raw, 32 bytes.
        signature: 64 bytes.
        message: Any bytes.

    Raises:
        MissingDependencyError: The extra `sign` is not installed.
    """
    ed25519 = _cryptography("hazmat.primitives.asymmetric.ed25519")
    if is_weak_key(public_key):
        return False
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except _cryptography("exceptions").InvalidSignature:
        return False
    return True


def is_weak_key(public_key: bytes) -> bool:
    """Whether anybody can make signatures that fit this raw public key.

    So it is with the points of small order, in all their encodings: what a signature is compared with then
    hardly depends on the message. OpenSSL accepts them.
    """
    y = int.from_bytes(public_key, "little") & (2**255 - 1)  # the top bit is the sign of x
    return y % _PRIME in _WEAK


def read_public_key(path: Path) -> bytes:
    """The raw public key, 32 bytes, of a PEM file as `openssl pkey -pubout` writes it.

    Raises:
        UsageError: The file is not there, or has anything but one Ed25519 public key.
        MissingDependencyError: The extra `sign` is not installed.
    """
    serialization = _cryptography("hazmat.primitives.serialization")
    data = _read_pem(path)
    if b"PRIVATE KEY-----" in data:
        raise UsageError(
            "this is a private key, where a public one is needed: keep it off the robots",
            where=path,
            fix=_EXTRACT,
        )
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, _cryptography("exceptions").UnsupportedAlgorithm) as error:
        raise _unreadable(path, "public", error) from error
    if not isinstance(key, _cryptography("hazmat.primitives.asymmetric.ed25519").Ed25519PublicKey):
        raise _other_kind(path, "public", key)
    raw: bytes = key.public_bytes_raw()
    if is_weak_key(raw):
        raise UsageError(
            "anybody can sign for this public key: it is a point of small order",
            where=path,
            got=raw.hex(),
            fix="do not use this key, and ask where it came from",
        )
    return raw


def read_signing_key(path: Path, password: Callable[[], bytes]) -> SigningKey:
    """The private key of a PEM file (PKCS8) as `openssl genpkey -algorithm ed25519` writes it.

    A file that others than its owner may read is warned of.

    Args:
        path: The file.
        password: Called where the key is encrypted.

    Raises:
        UsageError: The file is not there, has anything but one Ed25519 private key, or the password is wrong.
        MissingDependencyError: The extra `sign` is not installed.
    """
    serialization = _cryptography("hazmat.primitives.serialization")
    data = _read_pem(path)
    if b"PUBLIC KEY-----" in data:
        raise UsageError(
            "this is a public key, where a private one is needed", where=path, fix="give the private key"
        )
    encrypted = b"ENCRYPTED" in data
    try:
        key = serialization.load_pem_private_key(data, password() if encrypted else None)
    # TypeError: what says that it is encrypted is not, or the other way round.
    except (ValueError, TypeError, _cryptography("exceptions").UnsupportedAlgorithm) as error:
        if encrypted:
            raise UsageError(
                "the private key cannot be decrypted", where=path, got=error, fix="check the password"
            ) from error
        raise _unreadable(path, "private", error) from error
    if not isinstance(key, _cryptography("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey):
        raise _other_kind(path, "private", key)
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("others may read the private key %s; keep it to yourself: chmod 600 %s", path, path)
    return SigningKey(key)


def make_key_pair(path: Path) -> SigningKey:
    """Makes a key, and writes it to `path`, unencrypted, and its public key beside it, ending in `.pub`.

    Only the owner may read the private key. Nothing is overwritten.

    Raises:
        UsageError: One of the files exists or cannot be written, or `path` itself ends in `.pub`.
        MissingDependencyError: The extra `sign` is not installed.
    """
    serialization = _cryptography("hazmat.primitives.serialization")
    private = _cryptography("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey.generate()
    public = path.with_suffix(".pub")
    if public == path:
        raise UsageError("a private key is not named *.pub", where=path, fix="name it *.pem")
    if public.exists():
        raise _not_written(public, FileExistsError("it exists"))
    encoding, formats = serialization.Encoding.PEM, serialization
    secret = private.private_bytes(encoding, formats.PrivateFormat.PKCS8, formats.NoEncryption())
    _write_new(path, secret, 0o600)
    subject = formats.PublicFormat.SubjectPublicKeyInfo
    _write_new(public, private.public_key().public_bytes(encoding, subject), 0o644)
    return SigningKey(private)


def _cryptography(module: str) -> Any:
    return require(f"cryptography.{module}", extra="sign")


def _read_pem(path: Path) -> bytes:
    """The bytes of a file that has one PEM block."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PEM_BYTES + 1)
    except OSError as error:
        raise UsageError("the key cannot be read", where=path, got=error, fix="check the path") from error
    blocks = data.count(b"-----BEGIN ")
    if len(data) > _MAX_PEM_BYTES or blocks != 1:
        raise UsageError(
            "this is not a file with one key",
            where=path,
            expected="PEM, one block",
            got=f"{blocks} blocks" if len(data) <= _MAX_PEM_BYTES else f"more than {_MAX_PEM_BYTES} bytes",
            fix="make a key with: otau sign BUNDLE --new-key KEY.pem",
        )
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Writes a file that must not exist, for certain readers only from the start."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> UsageError:
    return UsageError(
        "the new key cannot be written, and nothing is overwritten",
        where=path,
        got=error,
        fix="choose another path, or sign with the key that is there: --key",
    )


def _unreadable(path: Path, kind: str, error: Exception) -> UsageError:
    return UsageError(
        f"this is not a {kind} key that can be read",
        where=path,
        expected=f"a PEM file with an Ed25519 {kind} key" + (" (PKCS8)" if kind == "private" else ""),
        got=error,
        fix=_EXTRACT if kind == "public" else _MAKE,
    )


def _other_kind(path: Path, kind: str, key: object) -> UsageError:
    return UsageError(
        f"the {kind} key is of another kind",
        where=path,
        expected="Ed25519",
        got=type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lstrip("_"),
        fix=_MAKE,
    )
