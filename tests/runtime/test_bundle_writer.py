"""Writing bundles: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from otau.runtime import Bundle
from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.errors import UsageError


def fingerprint(path):
    return Bundle.open(path).manifest.fingerprint


def test_a_written_bundle_opens_and_nothing_else_is_left(make_bundle, tmp_path):
    out = make_bundle(tmp_path / "deep/er/bundle")
    Bundle.open(out)
    assert [entry.name for entry in out.parent.iterdir()] == ["bundle"]


def test_files_in_folders_are_listed(bundle, tmp_path):
    manifest = Bundle.open(bundle).manifest
    with BundleWriter(tmp_path / "new") as writer:
        for name in manifest.files:
            (writer.path / name).write_bytes((bundle / name).read_bytes())
        (writer.path / "engines").mkdir()
        (writer.path / "engines/plan").write_bytes(b"plan")
        sealed = writer.seal(manifest)
    assert sealed == Bundle.open(tmp_path / "new").manifest
    assert sealed.files["engines/plan"].bytes == 4
    assert sealed.fingerprint != manifest.fingerprint


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("sealed", [False, True])
def test_an_exception_leaves_nothing(tmp_path, bundle, error, sealed):
    manifest = Bundle.open(bundle).manifest
    out = tmp_path / "out/new"

    def write():
        with BundleWriter(out) as writer:
            for name in manifest.files:
                (writer.path / name).write_bytes((bundle / name).read_bytes())
            if sealed:
                writer.seal(manifest)
            raise error

    with pytest.raises(error):
        write()
    assert list(out.parent.iterdir()) == []


def test_an_exception_leaves_the_bundle_that_was_there(bundle):
    before = fingerprint(bundle)

    def write():
        with BundleWriter(bundle) as writer:
            (writer.path / "prefix.onnx").write_bytes(b"half")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        write()
    assert fingerprint(bundle) == before
    assert [entry.name for entry in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_only_by_a_whole_one(bundle, make_bundle):
    before = fingerprint(bundle)
    make_bundle(bundle, policy="pi06")
    assert fingerprint(bundle) != before
    assert [entry.name for entry in bundle.parent.iterdir()] == ["bundle"]


def test_the_old_bundle_comes_back_when_the_last_rename_fails(bundle, make_bundle, monkeypatch):
    before = fingerprint(bundle)
    rename = Path.rename

    def failing(self, target):
        if Path(target) == bundle and not self.name.endswith(".old"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"):
        make_bundle(bundle, policy="pi06")
    assert fingerprint(bundle) == before
    assert [entry.name for entry in bundle.parent.iterdir()] == ["bundle"]


def test_a_block_without_seal_is_a_programming_error(tmp_path):
    with pytest.raises(RuntimeError, match="seal"), BundleWriter(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_may_be_filled(make_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    Bundle.open(make_bundle(tmp_path / "out"))


def test_what_is_not_a_bundle_is_not_replaced(make_bundle, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("work", "file", "dangling"):
        with pytest.raises(UsageError, match="not a bundle"):
            make_bundle(tmp_path / name)
    assert (tmp_path / "work/thesis.tex").read_text() == "years"


def test_a_parent_that_cannot_be_made_is_a_mistake_of_usage(make_bundle, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UsageError, match="cannot be written"):
        make_bundle(tmp_path / "file/bundle")


def test_a_bundle_is_as_readable_as_other_directories(make_bundle, tmp_path):
    (tmp_path / "plain").mkdir()
    out = make_bundle(tmp_path / "bundle")
    assert os.stat(out).st_mode == os.stat(tmp_path / "plain").st_mode


def test_files_that_were_written_privately_are_as_readable_as_others(bundle, tmp_path):
    manifest = Bundle.open(bundle).manifest
    with BundleWriter(tmp_path / "new") as writer:
        for name in manifest.files:
            (writer.path / name).write_bytes((bundle / name).read_bytes())
            (writer.path / name).chmod(0o600)
        writer.seal(manifest)
    (tmp_path / "plain").write_bytes(b"")
    modes = {entry.stat().st_mode for entry in (tmp_path / "new").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
