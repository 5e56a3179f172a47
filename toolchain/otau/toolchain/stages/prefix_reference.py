"""What the policy's prefix answers to the probes, in float32 and in bfloat16."""

from __future__ import annotations

from pathlib import Path

from otau.toolchain.compilation import Compilation
from otau.toolchain.gate.answer_file import write_prefix_reference
from otau.toolchain.gate.probes import make_probes
from otau.toolchain.gate.reference import ProbeFactsFromPolicy, prefix_reference

__all__ = ["REFERENCE", "run"]

REFERENCE = "prefix.safetensors"


def run(c: Compilation, folder: Path) -> None:
    """Leave the caches. At full size this takes the most memory of all stages: 11.7 GB of weights."""
    probes = make_probes(ProbeFactsFromPolicy(c.checkpoint.empty))
    write_prefix_reference(folder / REFERENCE, prefix_reference(c.checkpoint.load("prefix"), probes))
