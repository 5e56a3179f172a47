"""Intake: check the checkpoint strictly, and keep what is small of it."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
from safetensors.numpy import save_file

from otau.runtime.manifest import STATS_NAME
from otau.toolchain.compilation import CHECKPOINT, Compilation
from otau.toolchain.tokenizer import has_tokenizer, read_tokenizer
from otau.training.policies.checkpoint import check_values

__all__ = ["run"]

_LOG = logging.getLogger(__name__)


def run(c: Compilation, folder: Path) -> None:
    """Leave `checkpoint.json`, the statistics and, if there is one, `tokenizer.json`."""
    checkpoint = c.checkpoint
    check_values(checkpoint)
    stored = checkpoint.stored.values()
    facts = {
        "format": checkpoint.format,
        "parameters": sum(tensor.numel for tensor in stored),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "config": msgspec.to_builtins(checkpoint.config),
    }
    (folder / CHECKPOINT).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))
    save_file(checkpoint.statistics, folder / STATS_NAME)
    tokenizer = c.tokenizer or (c.source if has_tokenizer(c.source) else None)
    if tokenizer is not None:
        text = read_tokenizer(tokenizer, checkpoint.dims.vocab)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        _LOG.warning("no tokenizer was found, so the bundle takes token ids; give one with --tokenizer DIR")
