"""The card says what was judged, and obeys nothing that a checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from otau.runtime.bundle import Bundle
from otau.runtime.spec import CameraSpec, Manifest
from otau.toolchain.report import card
from otau.toolchain.thresholds import MAX_RELATIVE, NOISE_FLOORS, RELATIVE_RMS


@pytest.fixture
def manifest(compiled: Callable, tiny: Callable[[str], Path]) -> Manifest:
    return Bundle.open(compiled(tiny("pi05")).destination).manifest


def with_metrics(manifest: Manifest, *metrics: str) -> Manifest:
    gates = tuple(msgspec.structs.replace(manifest.gates[0], metric=metric) for metric in metrics)
    return msgspec.structs.replace(manifest, gates=gates)


def test_names_are_no_markup(manifest: Manifest) -> None:
    name = "a\x1b[2J\n# b ` | <script>\u202e\ud800"
    text = card(msgspec.structs.replace(manifest, cameras=(CameraSpec(name=name, height=8, width=8),)))
    shown = r"`a\x1b[2J\x0a# b \x60 \x7c \x3cscript\x3e\u202e\ud800` 8 x 8"
    assert shown in text
    text.encode()
    assert len(card(msgspec.structs.replace(manifest, cameras=(CameraSpec("a" * 10**6, 8, 8),)))) < 5000


def test_the_control_is_that_of_the_precision(manifest: Manifest) -> None:
    assert "The control, a weight scaled by 1.01, must fail." in card(with_metrics(manifest, MAX_RELATIVE))
    lower = card(with_metrics(manifest, NOISE_FLOORS, RELATIVE_RMS))
    assert "4 times the limit" in lower
    assert "1.01" not in lower
    mixed = card(with_metrics(manifest, NOISE_FLOORS, MAX_RELATIVE))
    assert "4 times the limit" in mixed
    assert "scaled by 1.01" in mixed


def test_what_was_allowed_is_said(manifest: Manifest) -> None:
    assert "--allow" not in card(manifest)
    assert "Compiled with `--allow seed`" in card(manifest, "seed")
