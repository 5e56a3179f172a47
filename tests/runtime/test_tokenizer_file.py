"""A tokenizer cannot make the runtime run out of memory, which would end the process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from otau.runtime import tokenizer_file
from otau.runtime.bundle import Bundle
from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.errors import BundleError
from otau.runtime.tokenizer_file import MAX_GROWTH, checked_tokenizer_text, load_tokenizer

BLOW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
PAD = {
    "strategy": {"Fixed": 10**12},
    "direction": "Right",
    "pad_to_multiple_of": 10**12,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}
A = {"Sequence": {"id": "A", "type_id": 0}}


def sequence(part: str, *steps: Any) -> dict[str, Any]:
    return {part: {"type": "Sequence", tokenizer_file._PARTS[part]: list(steps)}}


def template(single: list[Any], **special: Any) -> dict[str, Any]:
    step = {"type": "TemplateProcessing", "single": single, "special_tokens": special}
    return {"post_processor": step}


@pytest.fixture
def document(bundle) -> dict[str, Any]:
    return json.loads((bundle / "tokenizer.json").read_text())


def loaded(document: dict[str, Any], **changes: Any) -> Tokenizer:
    return load_tokenizer(json.dumps(document | changes).encode())


def test_padding_and_truncation_are_left_out(document):
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    tokenizer = loaded(document, padding=PAD, truncation=cut)
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    assert tokenizer.encode("pick up").ids == [2, 5, 6]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (sequence("normalizer", *[BLOW] * 12), "times longer"),
        ({"normalizer": BLOW | {"content": "a" * MAX_GROWTH}}, "times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "times longer"),
        (sequence("normalizer", *[{"type": "NFKD"}] * 3), "times longer"),
        (sequence("pre_tokenizer", *[{"type": "ByteLevel"}] * 4), "times longer"),
        (template([A] * (MAX_GROWTH + 1)), "times longer"),
        (template([A], x={"id": "x", "ids": [0] * (MAX_GROWTH + 1)}), "times longer"),
        (sequence("normalizer", *[{"type": "Strip"}] * 16), "more than 16 steps"),
        (sequence("normalizer", sequence("normalizer", *[BLOW] * 12)["normalizer"]), "times longer"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "'Precompiled'"),
        ({"normalizer": {"pattern": {"String": "a"}, "content": "b"}}, "not known"),
        ({"normalizer": {"type": []}}, "not known"),
        ({"normalizer": 3}, "no object"),
    ],
)
def test_what_lengthens_texts_without_bound_is_refused(changes, said, document):
    with pytest.raises(ValueError, match=said):
        loaded(document, **changes)


def test_a_key_that_is_there_twice_is_the_one_that_was_checked(document):
    text = json.dumps(document)[:-1] + f', "padding": {json.dumps(PAD)}, "padding": null}}'
    assert load_tokenizer(text.encode()).padding is None


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"[]", b"{}", b'{"a":' + b"[" * 10**6, b'"\xff"', b'{"a": 1e999}']
)
def test_what_is_no_tokenizer_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011  (the library's own words)
        load_tokenizer(data)


def test_a_large_file_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer_file, "MAX_TOKENIZER_BYTES", 10)
    with pytest.raises(ValueError, match="11 bytes, more than 10"):
        checked_tokenizer_text(b" " * 11)


def test_the_tokenizers_of_known_policies_are_fine(document):
    gemma = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    loaded(document, normalizer=gemma)
    llama = sequence("normalizer", {"type": "Prepend", "prepend": "\u2581"}, gemma)
    loaded(document, **llama, **sequence("pre_tokenizer", {"type": "Digits", "individual_digits": True}))
    loaded(document, normalizer=json.loads(normalizers.BertNormalizer().__getstate__()))


MADE = [
    ("normalizer", step)
    for step in (
        normalizers.BertNormalizer(),
        normalizers.Lowercase(),
        normalizers.NFC(),
        normalizers.NFD(),
        normalizers.NFKC(),
        normalizers.NFKD(),
        normalizers.ByteLevel(),
        normalizers.Prepend("abc"),
        normalizers.Replace("a", "xyz"),
    )
] + [
    ("pre_tokenizer", step)
    for step in (
        pre_tokenizers.ByteLevel(),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Digits(),
        pre_tokenizers.Whitespace(),
    )
]


@given(st.text(min_size=1))
def test_no_step_makes_a_text_longer_than_its_factor(text):
    for part, step in MADE:
        factor = tokenizer_file._factor(json.loads(step.__getstate__()))
        if part == "normalizer":
            result = step.normalize_str(text)
        else:
            result = "".join(piece for piece, _ in step.pre_tokenize_str(text))
        assert len(result) <= factor * len(text), step


def test_post_processors_add_what_their_factor_says():
    bert = processors.BertProcessing(("a", 0), ("b", 1))
    assert bert.num_special_tokens_to_add(False) + 1 == tokenizer_file._FACTORS["BertProcessing"]


def test_a_bundle_with_such_a_tokenizer_is_refused(bundle, document):
    manifest = Bundle.open(bundle).manifest
    out = bundle.with_name("changed")
    with BundleWriter(out) as writer:
        for name in manifest.files:
            (writer.path / name).write_bytes((bundle / name).read_bytes())
        changed = document | sequence("normalizer", *[BLOW] * 12)
        (writer.path / "tokenizer.json").write_text(json.dumps(changed))
        writer.seal(manifest)
    with pytest.raises(BundleError, match="times longer"):
        Bundle.open(out).tokenizer()
