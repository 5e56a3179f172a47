"""What others wrote is printed without being obeyed, and not at any length."""

from __future__ import annotations

import json
import logging
import signal
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otau.runtime import cli
from otau.runtime.errors import OtauError, UsageError
from otau.runtime.messages import excerpt, printable, shortened


@pytest.fixture(autouse=True)
def _signals():
    """A command ends with signals ignored, since it ends; these tests' process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


HOSTILE = "\x1b[2J\x07\r\x9b31m\u202e\u2066\u200f\ud800\u2028"


def test_control_characters_are_escaped():
    assert printable(HOSTILE) == (
        r"\x1b[2J\x07\r\x9b31m\u202e\u2066\u200f\ud800\u2028"
    )  # fmt: skip
    assert printable("öffne \N{PILE OF POO}\n\tdas\\x1b") == "öffne \N{PILE OF POO}\n\tdas\\x1b"


@given(st.text(st.characters()))
def test_what_is_printable_can_be_encoded(text):
    shown = printable(text)
    shown.encode()
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert printable(shown) == shown


def test_long_parts_are_cut():
    assert shortened("a" * 500) == "a" * 500
    assert shortened("a" * 10**6) == "a" * 500 + "... (1,000,000 characters)"
    error = OtauError("b" * 501, where="a" * 10**6)
    assert len(str(error)) < 1200
    assert error.where == "a" * 10**6
    assert error.parts()["what"].endswith("b... (501 characters)")


def test_long_arrays_are_not_written_out():
    assert excerpt(np.array([[1, 2]])) == "[[1, 2]]"
    assert excerpt(np.zeros((10, 10), int)) == f"100 numbers, first {[0] * 16}"


def test_errors_and_warnings_are_printable(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def start():
        logging.getLogger("otau").warning("a name: %s", HOSTILE)
        raise UsageError("wrong", got=HOSTILE)

    with pytest.raises(SystemExit):
        cli._run(start)
    printed = capsys.readouterr().err
    assert printed == (
        f"WARNING: a name: {printable(HOSTILE)}\nerror: wrong\n  got:      {printable(HOSTILE)}\n"
    )


@pytest.mark.parametrize("camera", [HOSTILE, "[red]x"])
def test_inspect_prints_any_name(camera, tmp_path, monkeypatch, capsys):
    features = {camera: {"type": "VISUAL", "shape": [3, 8, 8]}}
    (tmp_path / "config.json").write_text(json.dumps({"type": camera, "input_features": features}))
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["otau", "inspect", str(tmp_path), *options])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert printed == printable(printed)
        assert camera.encode("ascii", "backslashreplace")[-3:].decode() in printed
