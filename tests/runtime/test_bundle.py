"""Opening bundles: every damage is refused; and who may use them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil

import msgspec
import pytest

from otau.runtime import Bundle, bundle_files
from otau.runtime.errors import BundleError, MismatchError, UsageError
from otau.runtime.manifest import MAX_MANIFEST_BYTES, decode_manifest, encode_manifest, manifest_fingerprint
from otau.runtime.spec import FileSpec


def reseal(bundle, **changes):
    """Rewrites the manifest as someone who knows the format would, without looking at the files."""
    manifest = decode_manifest((bundle / "manifest.json").read_bytes(), bundle)
    manifest = msgspec.structs.replace(manifest, **changes)
    manifest = msgspec.structs.replace(manifest, fingerprint=manifest_fingerprint(manifest))
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


def test_a_whole_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert opened.manifest.policy == "pi05"
    assert opened.graph("decoder") == bundle / "decoder.onnx"
    assert opened.stats()["state"]["min"].shape == (2, 3)
    assert opened.tokenizer().token_to_id("pick") == 5


def test_every_file_is_verified_at_every_byte(bundle):
    rng = random.Random(0)
    for file in sorted(bundle.iterdir()):
        original = file.read_bytes()
        for position in {0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(5))}:
            damaged = bytearray(original)
            damaged[position] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises((BundleError, MismatchError)):
                Bundle.open(bundle)
        file.write_bytes(original)
    Bundle.open(bundle)


@pytest.mark.parametrize("change", [lambda raw: raw + b"\0", lambda raw: raw[:-1], lambda raw: b""])
def test_another_size_is_refused(bundle, change):
    file = bundle / "decoder.onnx"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(BundleError, match="another size"):
        Bundle.open(bundle)


def test_of_two_damaged_files_the_first_is_named_and_a_wrong_size_before_both(bundle):
    for name in ("ingest.onnx", "prefix.onnx"):
        raw = bytearray((bundle / name).read_bytes())
        raw[10] ^= 1
        (bundle / name).write_bytes(raw)
    for _ in range(20):
        with pytest.raises(BundleError, match="changed") as caught:
            Bundle.open(bundle)
        assert caught.value.where == bundle / "ingest.onnx"
    (bundle / "tokenizer.json").write_bytes(b"")
    with pytest.raises(BundleError, match="another size"):
        Bundle.open(bundle)


def test_a_damaged_file_does_not_wait_for_the_hash_of_a_large_one(bundle, monkeypatch):
    size, read = 2**32, []

    class Hash:
        def update(self, data):
            read.append(len(data))

        def hexdigest(self):
            return ""

    monkeypatch.setattr(bundle_files.hashlib, "sha256", Hash)
    with (bundle / "large").open("wb") as file:
        file.truncate(size)
    small = FileSpec(bytes=15, sha256="0")
    with pytest.raises(BundleError, match="changed"):
        bundle_files.verify_files(bundle, {"README.md": small, "large": FileSpec(bytes=size, sha256="")})
    assert sum(read) < size


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 10**6])
def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert bundle_files.file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_missing_file_is_named(bundle):
    names = [file.name for file in bundle.iterdir() if file.name != "manifest.json"]
    for name in names:
        (bundle / name).rename(bundle.parent / name)
        with pytest.raises(BundleError, match=f"missing(.|\n)*{name}"):
            Bundle.open(bundle)
        (bundle.parent / name).rename(bundle / name)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "a/../../outside",
        "a\\b",
        "./README.md",
        "",
        "a//b",
        "a\0b",
        "a\nb",
        ".",
    ],
)
def test_a_path_that_is_not_plain_is_refused(bundle, name):
    (bundle.parent / "outside").write_text("secret")
    files = Bundle.open(bundle).manifest.files
    reseal(bundle, files=files | {name: files["README.md"]})
    with pytest.raises(BundleError, match="plain relative"):
        Bundle.open(bundle)


def test_a_link_that_leaves_the_bundle_is_refused(bundle):
    (bundle / "README.md").rename(bundle.parent / "README.md")
    (bundle / "README.md").symlink_to(bundle.parent / "README.md")
    with pytest.raises(BundleError, match="outside"):
        Bundle.open(bundle)


def test_a_linked_directory_that_leaves_the_bundle_is_refused(bundle, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/file").write_bytes((bundle / "README.md").read_bytes())
    (bundle / "near").symlink_to(tmp_path / "far")
    files = decode_manifest((bundle / "manifest.json").read_bytes(), bundle).files
    reseal(bundle, files=files | {"near/file": files["README.md"]})
    with pytest.raises(BundleError, match="outside"):
        Bundle.open(bundle)


def test_a_link_inside_the_bundle_is_fine(bundle):
    (bundle / "engines").mkdir()
    (bundle / "README.md").rename(bundle / "engines/card")
    (bundle / "README.md").symlink_to("engines/card")
    Bundle.open(bundle)


def test_a_link_to_the_bundle_is_fine(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    Bundle.open(tmp_path / "link")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_refused_without_being_read(bundle, make):
    (bundle / "README.md").unlink()
    make(bundle / "README.md")
    with pytest.raises(BundleError, match="not a file"):
        Bundle.open(bundle)


def test_a_manifest_of_unbounded_size_is_refused(bundle):
    with (bundle / "manifest.json").open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "deep/er/weights.data", ".hidden", "engines"])
def test_an_unlisted_file_is_refused(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("mine")
    with pytest.raises(BundleError, match=f"does not list(.|\n)*'{name}'(.|\n)*remove them"):
        Bundle.open(bundle)


def test_an_unlisted_link_to_a_directory_or_nowhere_is_refused(bundle, tmp_path):
    (tmp_path / "far").mkdir()
    for target in ("far", "nowhere"):
        (bundle / "link").symlink_to(tmp_path / target)
        with pytest.raises(BundleError, match="does not list(.|\n)*'link'"):
            Bundle.open(bundle)
        (bundle / "link").unlink()


def test_of_many_unlisted_files_some_are_named(bundle):
    for index in range(8):
        (bundle / f"extra{index}").touch()
    with pytest.raises(BundleError, match="'extra4' and 3 more"):
        Bundle.open(bundle)


def test_engine_caches_may_be_built_later(bundle):
    (bundle / "engines/cpu").mkdir(parents=True)
    (bundle / "engines/cpu/plan").write_text("built later")
    Bundle.open(bundle)


@pytest.mark.parametrize("changes", [{"passed": False}, {"control_failed": False}])
def test_a_bundle_whose_gates_did_not_pass_is_refused(bundle, changes):
    (gate,) = Bundle.open(bundle).manifest.gates
    reseal(bundle, gates=(msgspec.structs.replace(gate, **changes),))
    with pytest.raises(BundleError, match="did not pass its gates(.|\n)*parity"):
        Bundle.open(bundle)


def test_a_bundle_without_gates_is_refused(bundle):
    reseal(bundle, gates=())
    with pytest.raises(BundleError, match="no gate"):
        Bundle.open(bundle)


def test_what_is_not_a_bundle_is_a_mistake_of_usage(tmp_path, bundle):
    with pytest.raises(UsageError, match="no such bundle"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a bundle"):
        Bundle.open(bundle / "decoder.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="not a bundle"):
        Bundle.open(tmp_path / "empty")


def test_a_checkpoint_is_told_to_be_compiled(golden):
    with pytest.raises(UsageError, match="otau compile"):
        Bundle.open(golden / "pi0")


def test_a_file_that_is_not_listed_is_not_handed_out(bundle):
    with pytest.raises(UsageError, match="did you mean 'decoder.onnx'"):
        Bundle.open(bundle).file("decoder.onx")


def test_damaged_statistics_and_tokenizers_are_reported(make_bundle, tmp_path):
    for name, use in (("stats.safetensors", Bundle.stats), ("tokenizer.json", Bundle.tokenizer)):
        path = make_bundle(tmp_path / name)
        opened = Bundle.open(path)
        (path / name).write_bytes(b"garbage")
        with pytest.raises(BundleError, match="cannot be read"):
            use(opened)
        shutil.rmtree(path)


def test_a_fitting_robot_passes(bundle):
    Bundle.open(bundle).require(
        policy="pi05",
        cameras=["wrist", "front"],
        state_names=["x", "y", "z"],
        action_names=["left", "right"],  # the manifest's are generic: only their number counts
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"policy": "pi0"}, "pi05"),
        ({"cameras": ["front"]}, "front, wrist"),
        ({"cameras": ["front", "wrst"]}, "did you mean 'wrist'"),
        ({"cameras": ["front", "wrist", "rear"]}, "2: front, wrist"),
        ({"state_names": ["x", "z", "y"]}, "x, y, z"),
        ({"state_names": ["x", "y"]}, "x, y, z"),
        ({"action_names": ["one"]}, "2: "),
    ],
)
def test_a_robot_that_does_not_fit_is_refused(bundle, given, expected):
    with pytest.raises(MismatchError, match=expected) as caught:
        Bundle.open(bundle).require(**given)
    assert caught.value.exit_code == 3


def test_statistics_of_a_dtype_that_numpy_lacks_are_reported(make_bundle, tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    entry = {"dtype": "F8_E8M0", "shape": [2, 3], "data_offsets": [0, 6]}
    header = json.dumps({"state.min": entry}).encode()
    where = bundle.path / "stats.safetensors"
    where.write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    with pytest.raises(BundleError, match="statistics cannot be read"):
        bundle.stats()
