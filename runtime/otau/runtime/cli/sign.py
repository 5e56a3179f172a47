"""`otau sign`: vouches for a bundle."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from otau.runtime.errors import UsageError

__all__ = ["sign"]

_PASSWORD = "OTAU_KEY_PASSWORD"


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of the bundle.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="PRIVATE.pem", help="Ed25519 private key, PEM.", show_default=False),
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY.pem",
            help="Make a key and sign with it; the public key is written beside it as KEY.pub.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Sign a bundle with an Ed25519 key, so that others can refuse what you did not sign.

    The bundle is verified first. The signature goes into signature.json and covers the manifest, and by
    its hashes every file; manifest and fingerprint stay as they are. A signature of the same key is
    replaced, those of other keys are kept.

    Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them. The password of an encrypted
    one is asked for on a terminal, or taken from the environment variable OTAU_KEY_PASSWORD. Keep the
    private key off the robots; they need KEY.pub, for --require-signature or OTAU_REQUIRE_SIGNATURE.

    Example: otau sign my_bundle --key private.pem
    """
    from otau.runtime.bundle import Bundle
    from otau.runtime.ed25519 import make_key_pair, read_signing_key
    from otau.runtime.signature import SIGNATURE_NAME, key_id

    # A key that cannot be used is refused before gigabytes are hashed; none is made for a damaged bundle.
    if key is not None and new_key is None:
        signing_key = read_signing_key(key, _password)
        opened = Bundle.open_to_sign(bundle)
    elif new_key is not None and key is None:
        opened = Bundle.open_to_sign(bundle)
        _refuse_inside(new_key, bundle)
        signing_key = make_key_pair(new_key)
    else:
        raise UsageError("give either --key PRIVATE.pem or --new-key KEY.pem")
    signed = opened.sign(signing_key)
    document = {
        "bundle": str(bundle),
        "fingerprint": signed.manifest.fingerprint,
        "signature": str(bundle / SIGNATURE_NAME),
        "key_id": key_id(signing_key.public_key),
        "new_key": None if new_key is None else str(new_key),
        "key_ids": [entry.key_id for entry in signed.signatures],
    }
    if json_output:
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"signed {bundle} with key {document['key_id']}")
    if new_key is not None:
        typer.echo(f"{new_key} is the private key, not encrypted: keep it off the robots")
        typer.echo(f"{new_key.with_suffix('.pub')} is the public key, for --require-signature")


def _refuse_inside(key: Path, bundle: Path) -> None:
    """A private key in the bundle would be given away with it."""
    if key.resolve().is_relative_to(bundle.resolve()):
        raise UsageError("the new key would lie in the bundle", where=key, fix="write it elsewhere")


def _password() -> bytes:
    """The password of an encrypted key."""
    given = os.environ.get(_PASSWORD)
    if given is not None:
        return given.encode()
    if not sys.stdin.isatty():
        raise UsageError(
            "the private key is encrypted, and there is no terminal to ask for the password on",
            fix=f"set the environment variable {_PASSWORD}",
        )
    from getpass import getpass

    return getpass("password of the private key: ").encode()
