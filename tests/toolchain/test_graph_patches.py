"""The registry of export patches."""

from __future__ import annotations

import types

import pytest

from otau.toolchain.graph.patches import PATCHES, Patch, applied


def test_every_patch_has_its_reason() -> None:
    """None is needed today: all other tests export unpatched. One to come brings its failing test."""
    assert PATCHES == ()


def test_patches_are_undone() -> None:
    library = types.SimpleNamespace(a=1, b=2)
    patches = [Patch(library, "a", 10, "why", "issue"), Patch(library, "b", 20, "why", "issue")]
    with applied(patches):
        assert (library.a, library.b) == (10, 20)
    assert (library.a, library.b) == (1, 2)


def test_patches_are_undone_after_an_error_and_after_a_bad_patch() -> None:
    library = types.SimpleNamespace(a=1)
    good = Patch(library, "a", 10, "why", "issue")

    def export_that_fails() -> None:
        with applied([good]):
            raise RuntimeError("export failed")

    def apply_a_patch_that_upstream_outgrew() -> None:
        with applied([good, Patch(library, "gone", 1, "why", "issue")]):
            pytest.fail("a patch of something that is not there must not apply")

    with pytest.raises(RuntimeError):
        export_that_fails()
    assert library.a == 1
    with pytest.raises(AttributeError):
        apply_a_patch_that_upstream_outgrew()
    assert library.a == 1
    assert not hasattr(library, "gone")
