"""Seal the bundle: its files, the card, the reports and the manifest with every file's hash."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import msgspec

from otau.runtime.bundle_files import refuse_unlisted
from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.errors import OtauError
from otau.runtime.manifest import MANIFEST_NAME, decode_manifest
from otau.runtime.signature import SIGNATURE_NAME
from otau.runtime.spec import Manifest
from otau.toolchain.compilation import Compilation
from otau.toolchain.compilation_report import compilation_report

__all__ = ["seal"]

_LOG = logging.getLogger(__name__)


def seal(c: Compilation, key: str) -> None:
    """Write the bundle, unless the destination holds it already.

    Args:
        c: With every stage passed.
        key: Of all that the bundle depends on.
    """
    note = c.cache.root / "bundles" / key[:32]
    if manifest := _current_manifest(c, note):
        c.manifest, c.up_to_date = manifest, True
        return
    # Only now: these import torch, which takes longer than finding that nothing is to be done.
    from otau.toolchain.html_report import html_report
    from otau.toolchain.manifest import ManifestFromCheckpoint
    from otau.toolchain.report import card

    with BundleWriter(c.destination) as writer:
        for name, source in c.bundle_files().items():
            _place(c, source, writer.path / name)
        graphs = c.graphs()
        manifest = ManifestFromCheckpoint(
            c.checkpoint,
            target=c.target,
            precision=c.precision,
            num_steps=c.steps,
            tokenizer="tokenizer.json" if c.tokenizer_json() else None,
            graphs={name: graph.spec for name, graph in graphs.items()},
            gates=c.gates,
        )
        document = compilation_report(c) | {"bundle": ".", "versions": manifest.versions}
        data = msgspec.json.format(msgspec.json.encode(document), indent=2)
        (writer.path / "report.json").write_bytes(data + b"\n")
        (writer.path / "report.html").write_text(html_report(document), encoding="utf-8")
        (writer.path / "README.md").write_text(card(manifest, c.allow), encoding="utf-8")
        c.manifest = writer.seal(manifest, c.cache.hashes.sha256)
    for name, file in c.manifest.files.items():
        # Linking and sealing touched them.
        c.cache.hashes.remember(c.destination / name, file.sha256)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(c.manifest.fingerprint, encoding="ascii")


def _current_manifest(c: Compilation, note: Path) -> Manifest | None:
    """The manifest at the destination, if it is that of this compilation and every file is as it says."""
    try:
        fingerprint = note.read_text(encoding="ascii") if note.is_file() else ""
        where = c.destination / MANIFEST_NAME
        manifest = decode_manifest(where.read_bytes(), where)
        if manifest.fingerprint != fingerprint:
            return None
        refuse_unlisted(c.destination, {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files})
        for name, file in manifest.files.items():
            path = c.destination / name
            if path.stat().st_size != file.bytes or c.cache.hashes.sha256(path) != file.sha256:
                _LOG.warning("%s was changed since it was compiled: the bundle is written again", path)
                return None
    except (OSError, OtauError, UnicodeDecodeError):
        return None
    return manifest


def _place(c: Compilation, source: Path, destination: Path) -> None:
    """Put a file of the cache into the bundle: the same bytes on disk where that is possible."""
    digest = c.cache.hashes.sha256(source)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
    c.cache.hashes.remember(destination, digest)
