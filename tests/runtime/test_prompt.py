"""Prompts: templates, padding, truncation."""

from __future__ import annotations

import json
import logging

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otau.runtime.errors import UsageError
from otau.runtime.prompt import (
    MAX_PROMPT_CHARACTERS,
    PromptEncoder,
    clean_task,
    fill_template,
    state_bins,
    state_text,
)
from otau.runtime.tokenizer_file import load_tokenizer


@given(st.text(), st.text())
def test_task_and_state_go_in_as_they_are(task, state):
    assert fill_template("Task: {task}, State: {state};\n", task, state) == f"Task: {task}, State: {state};\n"


def test_a_newline_is_added_only_to_a_task_without_one():
    assert fill_template("{task}\n", "lift") == "lift\n"
    assert fill_template("{task}\n", "lift\n") == "lift\n"


def test_a_label_follows_the_newline():
    template = "{task}\nAdvantage: positive\n"
    for task in ("lift", "lift\n"):
        assert fill_template(template, task) == "lift\nAdvantage: positive\n"


def test_a_task_is_cleaned_only_where_the_policy_was_trained_so(encoder):
    assert clean_task(" pick_up\nthe cup \n") == "pick up the cup"
    given = [" pick_up"]
    spec = msgspec.structs.replace(encoder.spec, clean_task=True)
    assert encoder.encode(given, [""])[0].tolist() == [[2, 1, 0, 0, 0]]
    encoder.spec = spec
    assert encoder.encode(given, [""])[0].tolist() == [[2, 5, 6, 0, 0]]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9))
def test_digitized_bins_are_numpys(values):
    values = np.float32(values)
    expected = np.digitize(values.astype(np.float64), np.linspace(-1, 1, 257)[:-1]) - 1
    np.testing.assert_array_equal(state_bins(values, "digitize"), expected)


def test_the_two_rules_differ_below_and_just_beneath_an_edge():
    values = np.float32([-1.5, -1e-9, 0, 1, np.inf, -np.inf])
    assert state_bins(values).tolist() == [0, 128, 128, 255, 255, 0]
    assert state_bins(values, "digitize").tolist() == [-1, 127, 128, 255, 255, -1]
    assert state_text(state_bins(values[:2], "digitize")) == "-1 127"


def test_bins_of_nan_are_refused():
    with pytest.raises(UsageError, match="NaN"):
        state_bins(np.float32([0, np.nan]))


@given(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=9))
def test_bins_grow_with_the_state(values):
    bins = state_bins(np.sort(np.float32(values)))
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() <= 255


@pytest.fixture
def encoder(bundle, manifest):
    document = json.loads((bundle / "tokenizer.json").read_text())
    # A tokenizer's own padding and truncation must not leak into the policy.
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 7,
        "pad_type_id": 0,
        "pad_token": ":",
    }
    spec = msgspec.structs.replace(manifest.prompt, template="{task}", max_length=5)
    return PromptEncoder(spec, load_tokenizer(json.dumps(document).encode()))


def test_prompts_are_padded_on_the_right_after_the_special_token(encoder):
    tokens, masks = encoder.encode(["pick up", "pick"], ["", ""])
    assert tokens.tolist() == [[2, 5, 6, 0, 0], [2, 5, 0, 0, 0]]
    assert masks.tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3]
    assert tokens.dtype == np.int64


def test_a_long_prompt_is_cut_with_a_warning(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        tokens, masks = encoder.encode(["pick up pick up pick up"], [""])
    assert tokens.tolist() == [[2, 5, 6, 5, 6]]
    assert masks.all()
    assert "was cut" in caplog.text


def test_a_prompt_beyond_all_bounds_is_refused_before_it_is_read(encoder):
    encoder.encode(["a" * MAX_PROMPT_CHARACTERS], [""])
    for read in (lambda text: encoder.encode([text], [""]), encoder.ids):
        with pytest.raises(UsageError, match="16,384 characters"):
            read("a" * (MAX_PROMPT_CHARACTERS + 1))


def test_a_tokenizer_that_leaves_no_room_for_the_prompt_is_refused(bundle, manifest):
    document = json.loads((bundle / "tokenizer.json").read_text())
    document["post_processor"]["single"] *= 6
    tokenizer = load_tokenizer(json.dumps(document).encode())
    with pytest.raises(UsageError, match="adds more tokens"):
        PromptEncoder(msgspec.structs.replace(manifest.prompt, max_length=5), tokenizer)


def test_a_prompt_that_just_fits_gives_no_warning(encoder, caplog):
    encoder.encode(["pick up pick up"], [""])
    assert not caplog.records


def test_texts_inside_the_prefix_have_no_special_tokens_and_are_never_cut(encoder):
    assert encoder.ids("pick up : pick up : pick").tolist() == [5, 6, 7, 5, 6, 7, 5]
