"""What the policy's decoder answers to the probes, and what bfloat16 and damage make of it."""

from __future__ import annotations

from pathlib import Path

from otau.toolchain.compilation import Compilation
from otau.toolchain.gate.answer_file import PROBES_NAME, read_prefix_reference, write_reference
from otau.toolchain.gate.reference import ProbeFactsFromPolicy, decoder_reference
from otau.toolchain.stages.prefix_reference import REFERENCE

__all__ = ["run"]


def run(c: Compilation, folder: Path) -> None:
    """Leave the whole reference: the bundle gets it too, and `otau verify` asks it again."""
    facts = ProbeFactsFromPolicy(c.checkpoint.empty)
    caches = read_prefix_reference(c.folder("prefix_reference") / REFERENCE, facts)
    reference = decoder_reference(c.checkpoint.load("decoder"), caches, c.steps)
    write_reference(folder / PROBES_NAME, reference)
