"""Signatures: what opening refuses where one is required, and what a hostile `signature.json` may try."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otau.runtime import Bundle
from otau.runtime.ed25519 import is_weak_key, make_key_pair, read_public_key, read_signing_key, signature_fits
from otau.runtime.errors import BundleError, MismatchError, MissingDependencyError, OtauError, UsageError
from otau.runtime.manifest import encode_manifest, manifest_fingerprint
from otau.runtime.signature import (
    MAX_SIGNATURE_BYTES,
    MAX_SIGNATURES,
    POLICY_VARIABLE,
    decode_signatures,
    encode_signatures,
    sign_manifest,
    signed_message,
    verifies,
)

pytest.importorskip("cryptography", reason="the extra [sign] is not installed")

PRIME = 2**255 - 19


def no_password():
    raise AssertionError("no password is needed")


@pytest.fixture
def keys(tmp_path):
    """Paths of two public keys, each with its private one beside it."""
    for name in ("ours", "theirs"):
        make_key_pair(tmp_path / f"{name}.pem")
    return tmp_path / "ours.pub", tmp_path / "theirs.pub"


def sign(path, public):
    return Bundle.open_to_sign(path).sign(read_signing_key(public.with_suffix(".pem"), no_password))


def rewrite(bundle, change):
    """Changes signature.json as somebody would who knows its formatting."""
    file = bundle / "signature.json"
    document = json.loads(file.read_bytes())
    changed = change(document)
    document = document if changed is None else changed
    file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def test_a_signed_bundle_opens(bundle, keys):
    ours, theirs = keys
    before = (bundle / "manifest.json").read_bytes()
    sign(bundle, ours)
    assert (bundle / "manifest.json").read_bytes() == before
    opened = Bundle.open(bundle, require_signature=ours)
    assert [entry.public_key for entry in opened.signatures] == [read_public_key(ours)]
    Bundle.open(bundle, require_signature=str(ours))
    Bundle.open(bundle, require_signature=[theirs, ours])
    Bundle.open(bundle)


def test_several_may_sign_and_each_keeps_one_signature(bundle, keys):
    for public in (*keys, keys[0]):
        signed = sign(bundle, public)
    assert signed.signatures == Bundle.open(bundle, require_signature=keys[0]).signatures
    assert len(signed.signatures) == 2
    Bundle.open(bundle, require_signature=keys[1])
    assert [file.name for file in bundle.parent.iterdir() if file.name.startswith(".")] == []


def test_as_many_may_sign_as_may_be_read(bundle, tmp_path):
    for index in range(MAX_SIGNATURES):
        make_key_pair(tmp_path / f"{index}.pem")
        sign(bundle, tmp_path / f"{index}.pub")
    assert (bundle / "signature.json").stat().st_size < MAX_SIGNATURE_BYTES
    make_key_pair(tmp_path / "more.pem")
    with pytest.raises(UsageError, match="as many signatures"):
        sign(bundle, tmp_path / "more.pub")
    Bundle.open(bundle, require_signature=tmp_path / "0.pub")


def test_an_unsigned_bundle_is_refused_first(bundle, keys):
    (bundle / "manifest.json").write_bytes(b"never parsed")
    with pytest.raises(BundleError, match="not signed"):
        Bundle.open(bundle, require_signature=keys[0])


def test_another_key_is_refused_first(bundle, keys):
    sign(bundle, keys[1])
    (bundle / "manifest.json").write_bytes(b"never parsed")
    with pytest.raises(MismatchError, match="not by a key") as caught:
        Bundle.open(bundle, require_signature=keys[0])
    assert caught.value.exit_code == 3


def test_an_edited_manifest_with_a_new_fingerprint_is_refused(bundle, keys):
    sign(bundle, keys[0])
    manifest = msgspec.structs.replace(Bundle.open(bundle).manifest, policy="pi0")
    manifest = msgspec.structs.replace(manifest, fingerprint=manifest_fingerprint(manifest))
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))
    Bundle.open(bundle)  # it is sound in itself
    with pytest.raises(BundleError, match="does not fit"):
        Bundle.open(bundle, require_signature=keys[0])


def test_an_edited_graph_is_refused(bundle, keys):
    sign(bundle, keys[0])
    raw = bytearray((bundle / "decoder.onnx").read_bytes())
    raw[100] ^= 1
    (bundle / "decoder.onnx").write_bytes(raw)
    with pytest.raises(BundleError, match="changed"):
        Bundle.open(bundle, require_signature=keys[0])


def test_a_signature_of_another_bundle_is_refused(make_bundle, tmp_path, keys):
    one, other = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other", policy="pi0")
    sign(one, keys[0])
    shutil.copy(one / "signature.json", other / "signature.json")
    with pytest.raises(BundleError, match="does not fit"):
        Bundle.open(other, require_signature=keys[0])


def test_a_valid_signature_of_somebody_else_does_not_help_an_invalid_one(make_bundle, tmp_path, keys):
    one, other = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other", policy="pi0")
    sign(one, keys[0])
    shutil.copy(one / "signature.json", other / "signature.json")
    sign(other, keys[1])
    with pytest.raises(BundleError, match="does not fit"):
        Bundle.open(other, require_signature=keys[0])
    Bundle.open(other, require_signature=keys)  # the other key's signature is enough where it is trusted


def test_a_signature_under_another_key_s_name_is_refused(bundle, keys):
    sign(bundle, keys[1])
    ours = read_public_key(keys[0])

    def disguise(document):
        (entry,) = document["signatures"]
        entry["public_key"] = base64.b64encode(ours).decode()
        entry["key_id"] = hashlib.sha256(ours).hexdigest()[:16]

    rewrite(bundle, disguise)
    with pytest.raises(BundleError, match="does not fit"):
        Bundle.open(bundle, require_signature=keys[0])


def test_every_byte_of_the_signature_counts(bundle, keys):
    sign(bundle, keys[0])
    file = bundle / "signature.json"
    original = file.read_bytes()
    for position in range(len(original)):
        for bit in (0, 5):
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises((BundleError, MismatchError)):
                Bundle.open(bundle, require_signature=keys[0])
    file.write_bytes(original)
    Bundle.open(bundle, require_signature=keys[0])


def entry_of(document):
    return document["signatures"][0]


MALFORMED = {
    "no signatures": lambda d: d.update(signatures=[]),
    "an unknown key": lambda d: d.update(comment="mine"),
    "an unknown key of an entry": lambda d: entry_of(d).update(comment="mine"),
    "a missing key": lambda d: entry_of(d).pop("key_id") and None,
    "another algorithm": lambda d: entry_of(d).update(algorithm="none"),
    "a short signature": lambda d: entry_of(d).update(signature=base64.b64encode(bytes(63)).decode()),
    "a long key": lambda d: entry_of(d).update(public_key=base64.b64encode(bytes(range(33))).decode()),
    "no base64": lambda d: entry_of(d).update(signature="*" * 88),
    "stray bits in base64": lambda d: entry_of(d).update(signature=entry_of(d)["signature"][:-3] + "B=="),
    "another key's name": lambda d: entry_of(d).update(key_id="0" * 16),
    "a key twice": lambda d: d["signatures"].append(dict(entry_of(d))),
    "too many": lambda d: d.update(signatures=[entry_of(d)] * (MAX_SIGNATURES + 1)),
    "null": lambda d: d.update(signatures=None),
    "a list": lambda d: [d],
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("required", [True, False])
def test_a_malformed_file_is_refused(bundle, keys, change, required):
    sign(bundle, keys[0])
    rewrite(bundle, change)
    with pytest.raises(BundleError, match="signatures (cannot be read|are malformed)"):
        Bundle.open(bundle, require_signature=keys[0] if required else None)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b'  "version": 1,', b'  "version": 1,\n  "version": 1,'),
        lambda raw: raw.replace(b'"algorithm"', b'"algorithm": "ed25519",\n      "algorithm"'),
        lambda raw: raw + b"\n",
        lambda raw: raw.replace(b"  ", b"\t"),
        lambda raw: raw.replace(b"ed25519", b"\\u0065d25519"),
        lambda raw: raw.replace(b"=", b"", 1),
    ],
    ids=["version twice", "algorithm twice", "newline", "tabs", "escapes", "base64 without padding"],
)
def test_another_way_to_write_the_same_is_refused(bundle, keys, change):
    sign(bundle, keys[0])
    file = bundle / "signature.json"
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    with pytest.raises(BundleError, match="signatures (cannot be read|are malformed)"):
        Bundle.open(bundle, require_signature=keys[0])


def test_another_version_is_a_mismatch(bundle, keys):
    sign(bundle, keys[0])
    rewrite(bundle, lambda document: document.update(version=2))
    with pytest.raises(MismatchError, match="version 2"):
        Bundle.open(bundle)


@pytest.mark.parametrize("size", [MAX_SIGNATURE_BYTES + 1, 2**33])
def test_an_oversized_file_is_refused_unread(bundle, size):
    with (bundle / "signature.json").open("wb") as file:
        file.truncate(size)
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle)


def test_a_million_signatures_are_refused_unread(bundle, keys):
    (bundle / "signature.json").write_text(json.dumps({"version": 1, "signatures": [{}] * 10**6}))
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle, require_signature=keys[0])


def test_deep_nesting_is_refused(bundle):
    (bundle / "signature.json").write_bytes(b"[" * MAX_SIGNATURE_BYTES)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle)


@pytest.mark.parametrize("required", [True, False])
def test_a_link_that_leaves_the_bundle_is_refused(bundle, tmp_path, keys, required):
    sign(bundle, keys[0])
    (bundle / "signature.json").rename(tmp_path / "elsewhere.json")
    for target in (tmp_path / "elsewhere.json", tmp_path / "nowhere"):
        (bundle / "signature.json").symlink_to(target)
        with pytest.raises(BundleError, match=r"outside|missing"):
            Bundle.open(bundle, require_signature=keys[0] if required else None)
        (bundle / "signature.json").unlink()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_refused(bundle, make):
    make(bundle / "signature.json")
    with pytest.raises(BundleError, match="not a file"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["signature.json.bak", "deep/signature.json", "Signature.json"])
def test_no_other_name_passes_unlisted(bundle, keys, name):
    sign(bundle, keys[0])
    (bundle / name).parent.mkdir(exist_ok=True)
    shutil.copy(bundle / "signature.json", bundle / name)
    with pytest.raises(BundleError, match="does not list"):
        Bundle.open(bundle, require_signature=keys[0])


def test_a_manifest_must_not_list_what_signs_it(bundle, keys):
    sign(bundle, keys[0])
    manifest = Bundle.open(bundle).manifest
    files = manifest.files | {"signature.json": manifest.files["README.md"]}
    manifest = msgspec.structs.replace(manifest, files=files)
    manifest = msgspec.structs.replace(manifest, fingerprint=manifest_fingerprint(manifest))
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(BundleError, match=r"lists signature\.json"):
        Bundle.open(bundle)


# --- the machine's policy


def test_the_machine_s_policy_binds_every_opening(bundle, keys, monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, str(keys[0]))
    with pytest.raises(BundleError, match=POLICY_VARIABLE):
        Bundle.open(bundle)
    sign(bundle, keys[1])
    for wish in (None, keys[1], list(keys)):
        with pytest.raises(MismatchError, match=POLICY_VARIABLE):
            Bundle.open(bundle, require_signature=wish)
    sign(bundle, keys[0])
    Bundle.open(bundle)
    monkeypatch.setenv(POLICY_VARIABLE, f"{keys[0]}:{keys[1]}")
    Bundle.open(bundle)


@pytest.mark.parametrize("policy", ["", ":", "ours.pub", "{ours}:"])
def test_a_policy_that_got_lost_is_not_a_lifted_one(bundle, keys, monkeypatch, policy):
    sign(bundle, keys[0])
    monkeypatch.chdir(keys[0].parent)
    monkeypatch.setenv(POLICY_VARIABLE, policy.format(ours=keys[0]))
    with pytest.raises(UsageError, match="absolute"):
        Bundle.open(bundle)


def test_no_key_is_not_no_requirement(bundle):
    with pytest.raises(UsageError, match="no key"):
        Bundle.open(bundle, require_signature=[])
    with pytest.raises(UsageError, match="cannot be read"):
        Bundle.open(bundle, require_signature="")


@pytest.mark.parametrize("by", ["call", "policy"])
def test_without_the_extra_nothing_passes_silently(bundle, keys, monkeypatch, by):
    sign(bundle, keys[0])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    if by == "policy":
        monkeypatch.setenv(POLICY_VARIABLE, str(keys[0]))
    with pytest.raises(MissingDependencyError, match=r"otau\[sign\]") as caught:
        Bundle.open(bundle, require_signature=keys[0] if by == "call" else None)
    assert caught.value.exit_code == 3
    monkeypatch.delenv(POLICY_VARIABLE, raising=False)
    assert len(Bundle.open(bundle).signatures) == 1  # reading them needs nothing


# --- keys


def test_the_weak_keys_are_all_those_of_small_order():
    """Computed from RFC 8032's curve: points whose order divides 8, in every encoding that fits 255 bits."""
    d = -121665 * pow(121666, -1, PRIME) % PRIME

    def add(one, other):
        (x1, y1), (x2, y2) = one, other
        k = d * x1 * x2 * y1 * y2
        return (
            (x1 * y2 + x2 * y1) * pow(1 + k, -1, PRIME) % PRIME,
            (y1 * y2 + x1 * x2) * pow(1 - k, -1, PRIME) % PRIME,
        )

    def x_of(y):
        square = (y * y - 1) * pow(d * y * y + 1, -1, PRIME) % PRIME
        x = pow(square, (PRIME + 3) // 8, PRIME)
        return x if x * x % PRIME == square else x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME

    order_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
    generator = (x_of(order_8), order_8)
    point, ys = (0, 1), set()
    for _ in range(8):
        ys.add(point[1])
        point = add(point, generator)
    assert point == (0, 1)
    assert len(ys) == 5
    for y in range(PRIME - 5, 2**255):  # from p on, y is that of y - p
        for top in (0, 2**255):
            assert is_weak_key((y + top).to_bytes(32, "little")) == (y % PRIME in ys)
    for y in ys:
        for top in (0, 2**255):
            assert is_weak_key((y + top).to_bytes(32, "little"))
    assert not is_weak_key((2).to_bytes(32, "little"))


def test_a_weak_key_verifies_nothing(bundle):
    """With the neutral point as key, R = B and S = 1 fit every message as far as OpenSSL goes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    base = (4 * pow(5, -1, PRIME) % PRIME).to_bytes(32, "little")
    forged, neutral = base + (1).to_bytes(32, "little"), (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(neutral).verify(forged, b"anything")  # raises nothing: so we must
    assert not signature_fits(neutral, forged, b"anything")
    entry = {
        "algorithm": "ed25519",
        "key_id": hashlib.sha256(neutral).hexdigest()[:16],
        "public_key": base64.b64encode(neutral).decode(),
        "signature": base64.b64encode(forged).decode(),
    }
    data = msgspec.json.format(msgspec.json.encode({"version": 1, "signatures": [entry]}), indent=2) + b"\n"
    (bundle / "signature.json").write_bytes(data)
    with pytest.raises(BundleError, match="anybody can sign"):
        Bundle.open(bundle)


def test_a_weak_public_key_is_not_trusted(tmp_path):
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    body = bytes.fromhex("302a300506032b6570032100") + (1).to_bytes(32, "little")
    load_der_public_key(body)  # a key, for the library
    pem = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(body).decode()}\n-----END PUBLIC KEY-----\n"
    (tmp_path / "weak.pub").write_text(pem)
    with pytest.raises(UsageError, match="anybody can sign"):
        read_public_key(tmp_path / "weak.pub")


def openssl(*arguments, **options):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openssl_s_keys_and_ours_are_the_same(bundle, tmp_path):
    """Each way: openssl makes the key and verifies our signature, and signs what we verify."""
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    sign(bundle, public)
    (entry,) = Bundle.open(bundle, require_signature=public).signatures
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(
        b"otau bundle signature v1\0" + hashlib.sha256((bundle / "manifest.json").read_bytes()).digest()
    )
    signature.write_bytes(entry.signature)
    verify = ("-verify", "-rawin", "-pubin", "-inkey", public, "-in", message, "-sigfile", signature)
    assert b"Success" in openssl("pkeyutl", *verify)
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", private, "-in", message, "-out", signature)
    assert signature.read_bytes() == entry.signature
    raw = openssl("pkey", "-pubin", "-in", public, "-outform", "DER")[-32:]
    assert entry.key_id == hashlib.sha256(raw).hexdigest()[:16]
    ours = make_key_pair(tmp_path / "ours.pem")
    extracted = openssl("pkey", "-in", tmp_path / "ours.pem", "-pubout")
    assert extracted == (tmp_path / "ours.pub").read_bytes()
    assert read_public_key(tmp_path / "ours.pub") == ours.public_key


def test_an_encrypted_key_needs_its_password(tmp_path):
    key = tmp_path / "key.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-aes-256-cbc", "-pass", "pass:secret", "-out", key)
    assert len(read_signing_key(key, lambda: b"secret").sign(b"")) == 64
    for wrong in (b"guess", b""):
        with pytest.raises(UsageError, match="cannot be decrypted"):
            read_signing_key(key, lambda wrong=wrong: wrong)


def test_keys_of_the_wrong_kind_are_named(tmp_path):
    for algorithm, name in (("RSA", "RSA"), ("X25519", "X25519"), ("ed448", "Ed448")):
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        openssl("genpkey", "-algorithm", algorithm, "-out", private)
        openssl("pkey", "-in", private, "-pubout", "-out", public)
        with pytest.raises(UsageError, match=f"another kind(.|\n)*Ed25519(.|\n)*{name}"):
            read_signing_key(private, no_password)
        with pytest.raises(UsageError, match=f"another kind(.|\n)*Ed25519(.|\n)*{name}"):
            read_public_key(public)


def test_the_wrong_half_of_a_key_is_named(keys):
    with pytest.raises(UsageError, match="this is a public key"):
        read_signing_key(keys[0], no_password)
    with pytest.raises(UsageError, match=r"this is a private key(.|\n)*openssl pkey"):
        read_public_key(keys[0].with_suffix(".pem"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN X-----\n", bytes(10**6)])
def test_a_file_that_is_no_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    for read in (read_public_key, lambda path: read_signing_key(path, no_password)):
        for path in (tmp_path / "key", tmp_path / "nowhere", tmp_path):
            with pytest.raises(UsageError):
                read(path)


def test_two_keys_in_a_file_are_refused(keys, tmp_path):
    (tmp_path / "both").write_bytes(keys[0].read_bytes() + keys[1].read_bytes())
    with pytest.raises(UsageError, match="one key"):
        read_public_key(tmp_path / "both")


def test_a_new_key_is_private_and_overwrites_nothing(tmp_path):
    make_key_pair(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "key.pem").read_bytes()
    for path in (tmp_path / "key.pem", tmp_path / "key.other", tmp_path / "no/key.pem", tmp_path / "x.pub"):
        with pytest.raises(UsageError):
            make_key_pair(path)
    (tmp_path / "key.pub").unlink()
    with pytest.raises(UsageError, match="nothing is overwritten"):
        make_key_pair(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["key.pem"]


def test_a_readable_private_key_is_warned_of(keys, caplog):
    private = keys[0].with_suffix(".pem")
    with caplog.at_level(logging.WARNING):
        read_signing_key(private, no_password)
        assert caplog.text == ""
        private.chmod(0o640)
        read_signing_key(private, no_password)
    assert "chmod 600" in caplog.text


# --- anything at all

SOUND = b'{\n  "version": 1,\n  "signatures": []\n}\n'


@given(st.binary(max_size=400) | st.text(max_size=100).map(str.encode) | st.just(SOUND))
def test_no_bytes_but_sound_ones_are_decoded(data):
    with pytest.raises(OtauError):
        decode_signatures(data, "x")


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_signature_is_of_one_manifest_only(one, other):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from otau.runtime.ed25519 import SigningKey

    entry = sign_manifest(one, SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32))))
    (again,) = decode_signatures(encode_signatures([entry]), "x")
    assert verifies(again, one)
    assert verifies(again, other) == (one == other)
    assert signed_message(one) != one
