"""The prompt: task and binned state as text, then as token ids."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from otau.runtime.errors import UsageError
from otau.runtime.messages import excerpt
from otau.runtime.spec import PromptSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "MAX_PROMPT_CHARACTERS",
    "PromptEncoder",
    "clean_task",
    "fill_template",
    "state_bins",
    "state_text",
]

_log = logging.getLogger(__name__)

MAX_PROMPT_CHARACTERS = 16 * 1024
"""Longest prompt that is given to a tokenizer, state included: several times what any policy reads of it."""
_BINS = 256
_EDGES = np.linspace(-1, 1, _BINS + 1)[:-1]
"""Where the bins begin: multiples of 1/128, exact in float64 and float32."""


def state_bins(normalised: np.ndarray, rule: Literal["clip", "digitize"] = "clip") -> np.ndarray:
    """The bin of each dimension of a normalised state: 256 equal bins over [-1, 1].

    Args:
        normalised: (..., n) float32; infinities and values out of range go to the outer bins.
        rule: `clip` is OpenTau's: clipped, then truncated in float32, whose sum x + 1 rounds values just
            below an edge up to it. `digitize` is openpi's and LeRobot's: values are compared with the
            edges, and those below -1 are bin -1.

    Returns:
        (..., n) int64 in 0..255, with `digitize` in -1..255.

    Raises:
        UsageError: A value is NaN.
    """
    values = np.asarray(normalised, np.float32)
    if np.isnan(values).any():
        raise UsageError("the normalised state has NaN", got=excerpt(values))
    if rule == "digitize":
        return np.digitize(values.astype(np.float64), _EDGES) - 1
    clamped = np.clip(values, np.float32(-1), np.float32(1))
    bins: np.ndarray = np.trunc((clamped + np.float32(1)) * np.float32(_BINS // 2)).astype(np.int64)
    bins[bins == _BINS] = _BINS - 1  # the upper edge itself
    return bins


def state_text(bins: np.ndarray) -> str:
    """The bins of one state (n,) as the prompt has them: joined by one space."""
    return " ".join(str(value) for value in bins.tolist())


def clean_task(task: str) -> str:
    """The task as openpi and LeRobot's pi0.5 have it: stripped, on one line, without underscores."""
    return task.strip().replace("_", " ").replace("\n", " ")


def fill_template(template: str, task: str, state: str = "") -> str:
    r"""The prompt's text.

    Where the template has a newline right after `{task}`, a task that already ends in one gets no
    second: training adds it only to tasks that have none.

    Args:
        template: With `{task}`, and `{state}` where the state is part of the text.
        task: What the robot is to do; braces in it are plain text.
        state: Text of the binned state.
    """

    def fill(match: re.Match[str]) -> str:
        if match.group() == "{state}":
            return state
        newline = match.group().endswith("\n") and not task.endswith("\n")
        return task + "\n" if newline else task

    return re.sub(r"\{task\}\n?|\{state\}", fill, template)


def _refuse_long(text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            "the prompt is too long",
            expected=f"at most {MAX_PROMPT_CHARACTERS:,} characters",
            got=f"{len(text):,} characters",
        )


class PromptEncoder:
    """Turns prompts into token ids and masks, with the bundle's tokenizer."""

    def __init__(self, spec: PromptSpec, tokenizer: Tokenizer) -> None:
        """Takes over a tokenizer of `load_tokenizer`.

        Raises:
            UsageError: The tokens that it adds to every prompt leave no room for the prompt.
        """
        self.spec = spec
        self._tokenizer = tokenizer
        self._pad = tokenizer.token_to_id("<pad>") or 0
        added = tokenizer.num_special_tokens_to_add(False)
        if added > spec.max_length:
            raise UsageError(
                "the tokenizer adds more tokens to a prompt than the prompt may have",
                expected=f"at most {spec.max_length}",
                got=added,
                fix="compile the checkpoint with its own tokenizer",
            )

    def encode(self, tasks: Sequence[str], states: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and masks of a batch of prompts, right-padded to `max_length`.

        A prompt that has more tokens is cut, with a warning.

        Args:
            tasks: One task an element of the batch.
            states: One text of the binned state each; unused where the template has no `{state}`.

        Returns:
            Ids (B, L) int64 and masks (B, L) bool, True for a real token.

        Raises:
            UsageError: A prompt has more than `MAX_PROMPT_CHARACTERS`.
        """
        length = self.spec.max_length
        tokens = np.full((len(tasks), length), self._pad, np.int64)
        masks = np.zeros((len(tasks), length), bool)
        self._tokenizer.enable_truncation(length)
        for row, (task, state) in enumerate(zip(tasks, states, strict=True)):
            task = clean_task(task) if self.spec.clean_task else task
            text = fill_template(self.spec.template, task, state)
            _refuse_long(text)
            encoding = self._tokenizer.encode(text, add_special_tokens=True)
            if encoding.overflowing:
                _log.warning("the prompt is longer than %d tokens and was cut: %.200r", length, text)
            tokens[row, : len(encoding.ids)] = encoding.ids
            masks[row, : len(encoding.ids)] = True
        return tokens, masks

    def ids(self, text: str) -> np.ndarray:
        """Token ids (n,) int64 of a text inside the prefix, without special tokens."""
        _refuse_long(text)
        self._tokenizer.no_truncation()
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
