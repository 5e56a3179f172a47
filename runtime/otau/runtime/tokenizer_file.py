"""`tokenizer.json`, checked before the library sees it.

The library follows the file's instructions without a bound on memory, and where memory runs out it ends the
process. So a file may lengthen a text by a known factor only:

- padding and truncation are left out; prompts are padded and cut to the bundle's length,
- each step through which a text goes is of a kind that is known here, and the product of all their factors is
  at most `MAX_GROWTH`. A step that puts n characters in the place of another one has the factor 1 + n.

PaliGemma's tokenizer has the factor 4: a space becomes another character, and `<bos>` is put in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MAX_GROWTH", "MAX_TOKENIZER_BYTES", "checked_tokenizer_text", "load_tokenizer"]

MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
"""Largest tokenizer that is read: twice PaliGemma's, which has 257,152 tokens."""
MAX_GROWTH = 512
_MAX_STEPS = 16
"""Steps and their groups, in each part of the file."""

_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
"""The parts that a text goes through, and where each has the members of a sequence."""
_FACTORS = (
    dict.fromkeys(("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation"), 1)
    | dict.fromkeys(("Nmt", "Sequence", "Split", "Strip", "StripAccents", "UnicodeScripts"), 1)
    | dict.fromkeys(("Whitespace", "WhitespaceSplit"), 1)
    # A letter that becomes two, a character before each word, and both together with UTF-8's bytes.
    | {"Lowercase": 2, "Metaspace": 2, "ByteLevel": 8}
    # The longest forms in Unicode; Bert's is NFD and Lowercase, and puts spaces on both sides.
    | {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "BertNormalizer": 12}
    # A token on both sides.
    | {"BertProcessing": 3, "RobertaProcessing": 3}
)
"""How many times longer each kind of step can make a text at most. `Precompiled` holds a table of its own,
with texts of any length, and is not among them."""


def checked_tokenizer_text(data: bytes) -> bytes:
    """The same tokenizer without padding and truncation.

    Args:
        data: A `tokenizer.json`.

    Returns:
        The file to give to the library.

    Raises:
        ValueError: It is too large, no JSON object, or has steps that are not known or lengthen a text beyond
            `MAX_GROWTH`; says which.
    """
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{len(data):,} bytes, more than {MAX_TOKENIZER_BYTES:,}")
    try:
        # Written anew, so that of a key that is there twice the library sees the one that is checked.
        document = msgspec.json.decode(data, type=dict[str, Any])
        document |= {"padding": None, "truncation": None}
        growth = math.prod(
            _factor(step)
            for part, members in _PARTS.items()
            for step in _steps(part, members, document.get(part))
        )
        text = msgspec.json.encode(document)
    except (msgspec.DecodeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not the JSON of a tokenizer: {error}") from None
    if growth > MAX_GROWTH:
        raise ValueError(f"its steps make a text up to {growth:,} times longer, more than {MAX_GROWTH} times")
    return text


def load_tokenizer(data: bytes) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without padding and truncation.

    Raises:
        ValueError: As `checked_tokenizer_text`, or the library cannot read it.
    """
    from tokenizers import Tokenizer

    text = checked_tokenizer_text(data).decode()
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(str(error)) from error


def _steps(part: str, members: str, step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part, sequences taken apart."""
    waiting, count = [] if step is None else [step], 0
    while waiting:
        step, count = waiting.pop(), count + 1
        if count > _MAX_STEPS:
            raise ValueError(f"its {part} has more than {_MAX_STEPS} steps")
        if not isinstance(step, dict):
            raise ValueError(f"its {part} has a step that is no object")
        if step.get("type") == "Sequence":
            waiting += _items(step.get(members))
        yield step


def _factor(step: dict[str, Any]) -> int:
    """How many times longer a step can make a text at most."""
    kind = step.get("type")
    if kind in ("Replace", "Prepend"):
        text = step.get("content" if kind == "Replace" else "prepend")
        return 1 + (len(text) if isinstance(text, str) else 0)
    if kind == "TemplateProcessing":
        special = step.get("special_tokens")
        tokens = special.values() if isinstance(special, dict) else ()
        ids = [len(_items(token.get("ids"))) for token in tokens if isinstance(token, dict)]
        return len(_items(step.get("single"))) * max([1, *ids])
    if not isinstance(kind, str) or kind not in _FACTORS:
        raise ValueError(f"it is not known how long a step {str(kind)[:40]!r} makes a text")
    return _FACTORS[kind]


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
