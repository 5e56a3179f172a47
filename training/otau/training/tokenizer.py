"""A small tokenizer for randomly initialised policies.

PaliGemma's own tokenizer is licensed and cannot be shipped. This one has its special tokens at the same ids
and puts `<bos>` in front of a prompt, as it does, so that everything behind it is exercised as with the
original; its vocabulary is a byte-level BPE of a few hundred robot instructions.
"""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = ["SPECIAL_TOKENS", "train_tokenizer"]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Ids 0 to 3, as in PaliGemma's tokenizer."""

_VERBS = ("pick up", "put down", "open", "close", "push", "pull", "turn on", "lift", "stack", "move")
_OBJECTS = (
    "the red block",
    "the black bowl",
    "the top drawer",
    "the mug",
    "the plate",
    "the basket",
    "the stove",
)
_PLACES = ("on the table", "in the basket", "next to the plate", "on top of the cabinet", "to the left")


def train_tokenizer(vocab: int) -> Tokenizer:
    """Train the tokenizer; the same every time.

    Args:
        vocab: Largest number of tokens, at least 260.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tasks = [" ".join(words) for words in itertools.product(_VERBS, _OBJECTS, _PLACES)]
    states = [" ".join(str((7 * i + 31 * j) % 256) for j in range(8)) for i in range(256)]
    texts = [f"Task: {task}, State: {states[i % 256]};\n" for i, task in enumerate(tasks)]
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS.index("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer
