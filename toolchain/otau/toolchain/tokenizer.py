"""Any tokenizer folder -> the `tokenizer.json` that the runtime reads."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from otau.runtime.errors import CheckpointError, UsageError
from otau.runtime.tokenizer_file import MAX_TOKENIZER_BYTES, load_tokenizer

__all__ = ["TOKENIZER_FILES", "has_tokenizer", "read_tokenizer"]

_LOG = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""What a tokenizer folder holds: a `tokenizers` file, or Gemma's SentencePiece model."""
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers reads besides a SentencePiece model, where it is there."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(folder: Path, vocab: int) -> str:
    """Read a tokenizer as the text of a `tokenizer.json`.

    Args:
        folder: Holds one of `TOKENIZER_FILES`.
        vocab: Rows of the policy's token table.

    Raises:
        UsageError: The folder holds no tokenizer.
        CheckpointError: The tokenizer cannot be read, is a link that leaves the folder, lengthens texts
            beyond bounds (see `otau.runtime.tokenizer_file`), or has more tokens than the policy.
    """
    from otau.training.policies.files import inside

    path = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(
            "this folder holds no tokenizer",
            where=folder,
            expected=" or ".join(TOKENIZER_FILES),
            fix="give the folder of the PaliGemma tokenizer, or leave --tokenizer out to feed token ids",
        )
    for name in (path.name, *_SIDE_FILES):
        if os.path.lexists(folder / name):
            inside(folder, name, name)
    try:
        data = _read(path)
        if path.suffix != ".json":
            from transformers import GemmaTokenizer

            # PaliGemma's prompts begin with <bos>; without its tokenizer_config.json the class leaves it out.
            told = (folder / "tokenizer_config.json").is_file()
            options = {} if told else {"add_bos_token": True}
            read = GemmaTokenizer.from_pretrained(str(folder), **options)
            data = read.backend_tokenizer.to_str().encode()
        tokenizer = load_tokenizer(data)
    except Exception as error:  # both libraries raise plain Exceptions
        raise CheckpointError("the tokenizer cannot be read", where=path, got=error) from None
    # Of the added tokens only those in front of every prompt: transformers adds some that no prompt contains.
    first = tokenizer.encode("a").ids
    largest = max([*tokenizer.get_vocab(with_added_tokens=False).values(), *first], default=-1)
    if largest >= vocab:
        raise CheckpointError(
            "the tokenizer has tokens that the policy does not know",
            where=path,
            expected=f"token ids below {vocab}",
            got=f"token id {largest}",
            fix="give the tokenizer that the policy was trained with",
        )
    bos = tokenizer.token_to_id("<bos>")
    if bos is not None and first[:1] != [bos]:
        _LOG.warning("%s does not put <bos> in front of a prompt, as PaliGemma's tokenizer does", path)
    return tokenizer.to_str()


def _read(path: Path) -> bytes:
    """The bytes of a file that is not too large to be a tokenizer."""
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MAX_TOKENIZER_BYTES:,}")
    return path.read_bytes()
